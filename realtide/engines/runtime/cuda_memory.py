"""What a TensorRT program needs of a CUDA device: memory, one stream, graphs (ours; over PyTorch)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import numpy as np

from realtide.engines.runtime.program import Array, ProgramError


class Buffer(Protocol):
    """Memory on the device."""

    @property
    def address(self) -> int:
        """Where it begins; aligned to 256 bytes."""
        ...

    @property
    def size(self) -> int:
        """Its bytes."""
        ...


class Device(Protocol):
    """A device with one stream, on which everything here is ordered."""

    @property
    def stream(self) -> int:
        """The stream's handle."""
        ...

    def allocate(self, size: int) -> Buffer:
        """Zeroed memory. Raises ProgramError."""
        ...

    def upload(self, buffer: Buffer, array: Array) -> None:
        """Copy an array to the beginning of a buffer; once for each buffer until `wait`.

        The array may change when this returns. Does not wait.
        """
        ...

    def download(self, buffer: Buffer, array: Array) -> None:
        """Copy a buffer's beginning into an array, which holds it after `wait`."""
        ...

    def copy_back(self, tensor: Any, buffer: Buffer) -> None:
        """Copy a buffer's beginning into a tensor of the caller's, on the device."""
        ...

    def view(self, buffer: Buffer, dtype: str, shape: tuple[int, ...]) -> Any:
        """A buffer's beginning as a tensor of the caller's framework; `dtype` as numpy names it."""
        ...

    def wait(self) -> None:
        """Wait until all is done. The only call that blocks the host."""
        ...

    def after_caller(self) -> None:
        """What follows here runs after what the caller has enqueued on its own stream."""
        ...

    def before_caller(self) -> None:
        """What the caller enqueues next on its own stream runs after what was enqueued here."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` enqueues, without running it; returns what runs it. Raises ProgramError."""
        ...


class _TorchBuffer:
    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.address, self.size = int(tensor.data_ptr()), int(tensor.numel())


def shaped(flat: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    """The beginning of a tensor of bytes as one of another type and shape; it shares the memory."""
    return flat[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


class CudaDevice:
    """A CUDA device through PyTorch. Not run yet: this project's machines have had no GPU.

    Args:
        index: of the device.

    Raises:
        ProgramError: PyTorch is not installed, or sees no such device.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            import torch
        except ImportError:
            raise ProgramError("TensorRT programs keep memory in PyTorch, which is not installed") from None
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise ProgramError(f"PyTorch {torch.__version__} sees no CUDA device {index}")
        self._torch: Any = torch
        self._device = torch.device("cuda", index)
        self._stream: Any = self._torch.cuda.Stream(self._device)
        # Pinned memory that copies go through, by buffer: made once, and free again after `wait`.
        self._staging: dict[int, Any] = {}
        self._landing: list[tuple[Any, Array]] = []

    @property
    def stream(self) -> int:
        """See `Device.stream`."""
        return int(self._stream.cuda_stream)

    def allocate(self, size: int) -> Buffer:
        """See `Device.allocate`."""
        try:
            tensor = self._torch.zeros(max(size, 1), dtype=self._torch.uint8, device=self._device)
        except self._torch.OutOfMemoryError as error:
            raise ProgramError(f"the device has no {size} bytes left: {error}") from error
        return _TorchBuffer(tensor)

    def upload(self, buffer: Buffer, array: Array) -> None:
        """See `Device.upload`."""
        if not array.nbytes:
            return
        assert isinstance(buffer, _TorchBuffer)
        pinned = self._pinned(buffer)[: array.nbytes]
        pinned.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with self._torch.cuda.stream(self._stream):
            buffer.tensor[: array.nbytes].copy_(pinned, non_blocking=True)

    def download(self, buffer: Buffer, array: Array) -> None:
        """See `Device.download`."""
        if not array.nbytes:
            return
        assert isinstance(buffer, _TorchBuffer)
        pinned = self._pinned(buffer)[: array.nbytes]
        with self._torch.cuda.stream(self._stream):
            pinned.copy_(buffer.tensor[: array.nbytes], non_blocking=True)
        self._landing.append((pinned, array))

    def copy_back(self, tensor: Any, buffer: Buffer) -> None:
        """See `Device.copy_back`."""
        assert isinstance(buffer, _TorchBuffer)
        flat = tensor.view(-1).view(self._torch.uint8)
        with self._torch.cuda.stream(self._stream):
            flat.copy_(buffer.tensor[: flat.numel()], non_blocking=True)

    def view(self, buffer: Buffer, dtype: str, shape: tuple[int, ...]) -> Any:
        """See `Device.view`."""
        assert isinstance(buffer, _TorchBuffer)
        return shaped(buffer.tensor, getattr(self._torch, dtype), shape)

    def _pinned(self, buffer: _TorchBuffer) -> Any:
        if buffer.address not in self._staging:
            made = self._torch.empty(buffer.size, dtype=self._torch.uint8, pin_memory=True)
            self._staging[buffer.address] = made
        return self._staging[buffer.address]

    def wait(self) -> None:
        """See `Device.wait`."""
        self._stream.synchronize()
        for pinned, array in self._landing:
            array.reshape(-1).view(np.uint8)[:] = pinned.numpy()
        self._landing.clear()

    def after_caller(self) -> None:
        """See `Device.after_caller`."""
        self._stream.wait_stream(self._torch.cuda.current_stream(self._device))

    def before_caller(self) -> None:
        """See `Device.before_caller`."""
        self._torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See `Device.capture`."""
        graph = self._torch.cuda.CUDAGraph()
        try:
            with self._torch.cuda.graph(graph, stream=self._stream):
                enqueue()
        except RuntimeError as error:
            raise ProgramError(f"the step cannot be captured as a CUDA graph: {error}") from error

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay
