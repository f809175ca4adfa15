"""Client of the Realtide server: live speech recognition over gRPC.

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
from realtide_client.retry import RetryPolicy
from realtide_client.stream import Control, SpeechStream
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
    "Control",
    "Encoding",
    "Endpoint",
    "EndpointingRules",
    "FieldViolation",
    "Final",
    "IdleTimeout",
    "InvalidRequest",
    "NotFound",
    "Partial",
    "PhraseBoost",
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
    "Word",
    "connect",
]
