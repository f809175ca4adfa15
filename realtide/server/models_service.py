"""Models.ListModels and Models.DescribeModel."""

from __future__ import annotations

from typing import Any

import grpc

from realtide.engines.easycontrol.types import ImageModelInfo
from realtide.engines.longlive.types import VideoModelInfo
from realtide.server import image_fields, speech_fields, video_fields
from realtide.server.audio import BYTES
from realtide.server.host import Host
from realtide.server.models import ImageModel, ServedModel, SpeechInfo, SpeechModel, VideoModel
from realtide.server.sessions import limits
from realtide.server.status import StatusError, invalid, no_model
from realtide_client.v1 import image_pb2, models_pb2_grpc, speech_pb2, video_pb2
from realtide_client.v1 import models_pb2 as pb

SERVICE = "realtide.v1.Models"


class ModelsService(models_pb2_grpc.ModelsServicer):
    """The gRPC service."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        """Every model, by name."""
        return pb.ListModelsResponse(
            models=[self._describe(model) for _, model in sorted(self._host.models.items())]
        )

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DescribeModelResponse:
        """One model."""
        models = self._host.models
        try:
            if not request.name:
                raise invalid("name", f"empty, must be one of {', '.join(sorted(models))}")
            if request.name not in models:
                raise no_model(request.name, sorted(models))
        except StatusError as error:
            await error.abort(context)
        return pb.DescribeModelResponse(model=self._describe(models[request.name]))

    def _describe(self, model: ServedModel) -> pb.Model:
        info, admission = model.info, model.admission
        state = pb.MODEL_STATE_READY
        if model.failed:
            state = pb.MODEL_STATE_FAILED
        elif admission.draining:
            state = pb.MODEL_STATE_DRAINING
        described = pb.Model(
            name=model.name,
            version=info.version,
            engine=model.engine_name,
            state=state,
            backend=info.backend,
            precision=info.precision,
            device=info.device,
            license=info.license,
            capacity=pb.Capacity(
                slots=admission.slots,
                free_slots=max(admission.slots - admission.used, 0),
                queued=admission.queued,
                max_queued=admission.queue_limit,
                max_batch=model.max_batch,
            ),
            limits=limits(self._host.config),
        )
        if model.choice is not None:
            described.runtime = model.choice.runtime
            for one in model.choice.passed:
                described.runtimes_passed.add(runtime=one.runtime, reason=one.reason)
        if isinstance(model, SpeechModel):
            described.speech.CopyFrom(self._speech(model.info))
        if isinstance(model, VideoModel):
            described.video.CopyFrom(self._video(model.info))
        if isinstance(model, ImageModel):
            described.image.CopyFrom(self._image(model.info))
        return described

    def _speech(self, info: SpeechInfo) -> pb.SpeechModel:
        fields = speech_fields.Fields(info, self._host.config)
        return pb.SpeechModel(
            language_codes=info.language_codes,
            model_sample_rate_hz=info.sample_rate,
            encodings=[speech_pb2.AudioEncoding.ValueType(encoding) for encoding in BYTES],
            frame_seconds=info.frame_seconds,
            front_end_lookahead_ms=info.front_end_lookahead_ms,
            max_lookahead_ms=info.max_lookahead_ms,
            default_options=fields.options(speech_pb2.SpeechOptions(), "options"),
            limits=fields.limits(),
        )

    def _video(self, info: VideoModelInfo) -> pb.VideoModel:
        fields = video_fields.Fields(info, self._host.config)
        return pb.VideoModel(
            sizes=[pb.VideoSize(width=width, height=height) for width, height in info.sizes],
            encodings=[video_pb2.VideoEncoding.ValueType(encoding) for encoding in video_fields.ENCODINGS],
            frames_per_second=info.frames_per_second,
            block_frames=info.block,
            first_block_frames=info.first_block,
            session_bytes=info.session_bytes,
            limits=fields.limits(info.frames_per_second),
        )

    def _image(self, info: ImageModelInfo) -> pb.ImageModel:
        roles = {"spatial": pb.CONDITION_ROLE_SPATIAL, "subject": pb.CONDITION_ROLE_SUBJECT}
        return pb.ImageModel(
            width=info.size[0],
            height=info.size[1],
            encodings=[image_pb2.ImageEncoding.ValueType(encoding) for encoding in image_fields.ENCODINGS],
            steps=info.steps,
            guidance=info.guidance,
            kinds=[pb.ConditionKind(name=name, role=roles[role]) for name, role in info.kinds.items()],
            condition_size=info.condition_size,
            condition_bytes=info.condition_bytes,
            cache_bytes=info.cache_bytes,
            preview_scale=info.preview_scale,
            limits=image_fields.Fields(info, self._host.config).limits(),
        )
