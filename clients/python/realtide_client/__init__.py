"""Client of the Realtide server: live speech recognition, video and images over gRPC.

`connect` gives the asyncio client; `realtide_client.sync.connect` the same without asyncio.
"""

from realtide_client.client import Client, connect
from realtide_client.errors import (
    AccessDenied,
    Cancelled,
    CheckpointRefused,
    FieldViolation,
    IdleTimeout,
    InvalidRequest,
    NotFound,
    RealtideError,
    ResourceExhausted,
    ServerError,
    StreamClosed,
    StreamLost,
    Unavailable,
)
from realtide_client.image import ImageStream
from realtide_client.image_types import (
    Condition,
    ConditionsReady,
    Image,
    ImageCancelled,
    ImageEncoding,
    ImageEvent,
    ImageInfo,
    ImageOptions,
    Preview,
    Progress,
)
from realtide_client.receipts import Control
from realtide_client.retry import RetryPolicy
from realtide_client.stream import SpeechStream
from realtide_client.types import (
    Accepted,
    Alternative,
    Applied,
    Checkpoint,
    Encoding,
    Endpoint,
    EndpointingRules,
    Final,
    Partial,
    PhraseBoost,
    Result,
    SessionInfo,
    SpeechOptions,
    Timing,
    Word,
)
from realtide_client.video import VideoStream
from realtide_client.video_types import (
    Frames,
    PromptApplied,
    VideoEncoding,
    VideoEvent,
    VideoInfo,
    VideoOptions,
)

__version__ = "0.1.0"

__all__ = [
    "Accepted",
    "AccessDenied",
    "Alternative",
    "Applied",
    "Cancelled",
    "Checkpoint",
    "CheckpointRefused",
    "Client",
    "Condition",
    "ConditionsReady",
    "Control",
    "Encoding",
    "Endpoint",
    "EndpointingRules",
    "FieldViolation",
    "Final",
    "Frames",
    "IdleTimeout",
    "Image",
    "ImageCancelled",
    "ImageEncoding",
    "ImageEvent",
    "ImageInfo",
    "ImageOptions",
    "ImageStream",
    "InvalidRequest",
    "NotFound",
    "Partial",
    "PhraseBoost",
    "Preview",
    "Progress",
    "PromptApplied",
    "RealtideError",
    "ResourceExhausted",
    "Result",
    "RetryPolicy",
    "ServerError",
    "SessionInfo",
    "SpeechOptions",
    "SpeechStream",
    "StreamClosed",
    "StreamLost",
    "Timing",
    "Unavailable",
    "VideoEncoding",
    "VideoEvent",
    "VideoInfo",
    "VideoOptions",
    "VideoStream",
    "Word",
    "connect",
]
