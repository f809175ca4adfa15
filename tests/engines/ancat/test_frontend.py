"""The front end: independent of chunking, end rule, restoring, agreement with references."""

from __future__ import annotations

import math
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from realtide.engines.ancat import fbank as fbank_module
from realtide.engines.ancat.frontend import Features, Frontend, FrontendConfig, offline_features

CLIPS = Path(__file__).parents[2] / "data" / "audio"
RATES = (8000, 11025, 16000, 22050, 44100, 48000, 12345)


def speechlike(rate: int, seconds: float, seed: int = 0) -> np.ndarray:
    """Amplitude-modulated harmonics with noise: structure in time and frequency below 3 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(rate * seconds)) / rate
    tone = sum(
        np.sin(2 * np.pi * f * t + p) / k for k, (f, p) in enumerate([(180, 0), (1110, 1), (2900, 2)], 1)
    )
    envelope = 0.5 * (1 + np.sin(2 * np.pi * 3 * t))
    return (0.2 * envelope * tone + 0.005 * rng.standard_normal(len(t))).astype(np.float32)


def feed(frontend: Frontend, samples: np.ndarray, sizes: list[int], takes: int | None = None) -> np.ndarray:
    """All windows of `samples` pushed in chunks of `sizes` (repeated), `takes` windows at most at a time."""
    out, position, k = [], 0, 0
    while position < len(samples):
        size = sizes[k % len(sizes)]
        frontend.push(samples[position : position + size])
        out.append(frontend.take(takes))
        position, k = position + size, k + 1
    frontend.finish()
    out.append(frontend.take())
    return np.concatenate(out)


@pytest.mark.parametrize("rate", RATES)
def test_chunking_does_not_change_a_bit(rate: int) -> None:
    samples = speechlike(rate, 1.337)
    once = feed(Frontend(rate), samples, [len(samples)])
    rng = np.random.default_rng(1)
    for sizes in ([rate // 100], [37 * rate // 1000], list(rng.integers(0, rate // 5, 50))):
        np.testing.assert_array_equal(feed(Frontend(rate), samples, sizes), once)
    np.testing.assert_array_equal(feed(Frontend(rate), samples, [rate // 10], takes=1), once)


@pytest.mark.parametrize("path", sorted(CLIPS.glob("*.flac")), ids=lambda path: path.stem)
def test_chunking_does_not_change_a_bit_on_real_recordings(path: Path) -> None:
    samples, rate = soundfile.read(path, dtype="float32")
    once = feed(Frontend(rate), samples, [len(samples)])
    np.testing.assert_array_equal(once[:, 3:].reshape(-1, 80), offline_features(samples, rate))
    rng = np.random.default_rng(2)
    for sizes in ([rate // 100], [37 * rate // 1000], list(rng.integers(0, rate // 2, 20))):
        np.testing.assert_array_equal(feed(Frontend(rate), samples, sizes), once)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=8).filter(any), st.sampled_from((8000, 16000)))
def test_any_chunking_does_not_change_a_bit(sizes: list[int], rate: int) -> None:
    samples = speechlike(rate, 0.3)
    once = feed(Frontend(rate), samples, [len(samples)])
    np.testing.assert_array_equal(feed(Frontend(rate), samples, sizes), once)


def test_streams_that_share_features_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of several rates in one call, some with nothing to give; more units than fit at once."""
    monkeypatch.setattr(fbank_module, "_UNITS", 3)
    mean, std = np.linspace(1, 2, 80, dtype=np.float32), np.linspace(2, 3, 80, dtype=np.float32)
    rates = (16000, 8000, 16000, 44100)
    sounds = [speechlike(rate, 0.9 + seed / 10, seed) for seed, rate in enumerate(rates)]
    shared = Features(mean=mean, std=std)
    streams = [Frontend(rate, features=shared) for rate in rates]
    got: list[list[np.ndarray]] = [[] for _ in rates]
    rng, pushed = np.random.default_rng(3), [0] * len(rates)
    for last in [False] * 20 + [True]:
        for k, (stream, sound) in enumerate(zip(streams, sounds, strict=True)):
            n = len(sound) - pushed[k] if last else int(rng.integers(0, stream.sample_rate // 10))
            stream.push(sound[pushed[k] : pushed[k] + n])
            pushed[k] = min(pushed[k] + n, len(sound))
            if last:
                stream.finish()
        drawn = [stream.draw(None if last else 2) for stream in streams]
        windows = shared.windows(drawn)
        assert len(windows) == sum(one.units for one in drawn)
        at = 0
        for k, one in enumerate(drawn):
            got[k].append(windows[at : at + one.units])
            at += one.units
    for rate, sound, parts in zip(rates, sounds, got, strict=True):
        alone = feed(Frontend(rate, mean=mean, std=std), sound, [len(sound)])
        np.testing.assert_array_equal(np.concatenate(parts), alone)


@pytest.mark.parametrize(
    "path", [None, *sorted(CLIPS.glob("*.flac"))], ids=lambda path: getattr(path, "stem", "")
)
def test_features_are_kaldis(path: Path | None) -> None:
    """Complete frames agree with a plain offline run of kaldi-native-fbank over the recording, floored."""
    samples, rate = (speechlike(16000, 2.0), 16000) if path is None else soundfile.read(path, dtype="float32")
    if rate != 16000:
        samples = soxr.resample(samples, rate, 16000, "HQ")
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80
    options.mel_opts.high_freq = -400.0
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(16000, (samples * 32768).tolist())
    expected = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])
    ours = offline_features(samples, 16000)
    assert ours.shape == (4 * math.ceil(len(samples) / 640), 80)
    # In nats. Both round to float32, which shows in bands far below the loudest.
    difference = np.abs(ours[: len(expected)] - np.maximum(expected, 0))
    assert difference.max() < 0.02
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_fixed_window_resampling_is_the_whole_files(rate: int) -> None:
    """Compared with soxr run once over the whole recording: the same up to the resampler's own accuracy."""
    samples = speechlike(rate, 1.0)
    whole = offline_features(soxr.resample(samples, rate, 16000, "HQ"), 16000)
    ours = offline_features(samples, rate)
    # Only where speech is: the upper bands hold the resampler's own noise, near the floor; and the
    # recording's abrupt end rings differently when zeros follow.
    ours, whole = ours[:92], whole[:92]
    audible = whole > 4.0
    assert audible.mean() > 0.3
    assert np.abs(ours - whole)[audible].max() < 2e-2
    assert np.abs(ours - whole)[audible].mean() < 1e-4


def test_a_recording_sounds_alike_at_every_rate() -> None:
    reference = offline_features(speechlike(16000, 1.0), 16000)
    low = FrontendConfig().mel_bins * 6 // 10  # bands under about 2.7 kHz, below every rate's cut-off
    for rate in (8000, 24000, 44100, 48000):
        ours = offline_features(soxr.resample(speechlike(16000, 1.0), 16000, rate, "VHQ"), rate)
        inner = np.abs(ours[4:90, :low] - reference[4:90, :low])
        assert np.median(inner) < 5e-3, rate


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("model_samples", [0, 1, 639, 640, 641, 6400, 7001])
def test_every_started_frame_is_completed(rate: int, model_samples: int) -> None:
    n = model_samples * rate // 16000
    frontend = Frontend(rate)
    frontend.push(np.full(n, 0.1, np.float32))
    before = frontend.frames_ready
    frontend.finish()
    frontend.finish()
    expected = math.ceil(math.ceil(n * 16000 / rate) / 640)
    assert frontend.frames_ready == expected >= before
    assert frontend.take().shape == (expected, 7, 80)
    assert frontend.frames_ready == 0
    assert frontend.samples_pushed == n
    with pytest.raises(ValueError, match="after finish"):
        frontend.push(np.zeros(1, np.float32))


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_frame_exists_as_soon_as_its_lookahead_allows(rate: int) -> None:
    frontend = Frontend(rate)
    needed = 0
    while not frontend.frames_ready:
        frontend.push(np.zeros(1, np.float32))
        needed += 1
    assert needed / rate == pytest.approx(0.04 + frontend.lookahead, abs=1.01 / rate)
    assert frontend.lookahead <= 0.026


def test_windows_overlap_and_start_with_zeros_after_normalisation() -> None:
    mean, std = np.linspace(3, 9, 80, dtype=np.float32), np.linspace(1, 3, 80, dtype=np.float32)
    samples = speechlike(16000, 0.5)
    frontend = Frontend(16000, mean=mean, std=std)
    windows = feed(frontend, samples, [160])
    features = offline_features(samples, 16000)
    np.testing.assert_array_equal(windows[0, :3], 0)
    np.testing.assert_array_equal(windows[1:, :3], windows[:-1, 4:])
    np.testing.assert_allclose(windows[:, 3:].reshape(-1, 80), (features - mean) / std, atol=1e-5)


def test_digital_silence_is_floored() -> None:
    assert (offline_features(np.zeros(16000, np.float32), 16000) == 0.0).all()
    quiet = offline_features(np.zeros(16000, np.float32), 16000, FrontendConfig(log_floor=-3.0))
    assert (quiet == -3.0).all()


@pytest.mark.parametrize("rate", RATES)
def test_restored_stream_continues_bit_for_bit(rate: int) -> None:
    samples = speechlike(rate, 1.0)
    whole = feed(Frontend(rate), samples, [len(samples)])
    for cut in (0, 100, rate // 25, rate // 3 + 7, len(samples)):
        first = Frontend(rate)
        first.push(samples[:cut])
        head = first.take()
        second = Frontend.restore(first.export())
        assert second.samples_pushed == cut
        tail = feed(second, samples[cut:], [rate // 50])
        np.testing.assert_array_equal(np.concatenate((head, tail)), whole)
        np.testing.assert_array_equal(feed(first, samples[cut:], [rate // 50]), tail)


def test_restore_refuses_what_does_not_fit() -> None:
    frontend = Frontend(16000)
    frontend.push(speechlike(16000, 0.2))
    frontend.take()
    state = frontend.export()
    for key, value in (
        ("samples", state["samples"][1:]),
        ("overlap", state["overlap"][1:]),
        ("last_rows", np.zeros((3, 40), np.float32)),
        ("inserted", -1),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            Frontend.restore(state | {key: value})
    with pytest.raises(ValueError, match="does not fit"):
        Frontend.restore(state, FrontendConfig(mel_bins=40))


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_flush_covers_all_audio_and_the_stream_goes_on(rate: int) -> None:
    samples = speechlike(rate, 0.99)
    cut = rate // 3
    frontend = Frontend(rate)
    frontend.push(samples[:cut])
    taken = len(frontend.take())
    inserted = frontend.flush()
    assert 0 < inserted <= round(0.075 * rate) + 2
    assert frontend.flush() == 0  # everything is covered already
    assert taken + frontend.frames_ready == math.ceil(math.ceil(cut * 16000 / rate) / 640)
    rest = feed(frontend, samples[cut:], [rate // 100])
    silence = np.zeros(inserted, np.float32)
    padded = feed(Frontend(rate), np.concatenate((samples[:cut], silence, samples[cut:])), [rate // 100])
    np.testing.assert_array_equal(rest, padded[taken:])
    assert frontend.samples_pushed == len(samples)


def test_state_is_bounded_and_no_memory_is_kept() -> None:
    frontend = Frontend(48000)
    frontend.push(np.zeros(48000 * 20, np.float32))
    frontend.take()
    sizes = []
    for _ in range(100):
        frontend.push(np.zeros(480, np.float32))
        frontend.take()
        sizes.append(frontend.export()["samples"].nbytes)
    assert max(sizes) < 0.075 * 48000 * 4
    assert len(frontend._samples._buffer) < 16384  # the burst's buffer was let go


def test_bad_parameters_are_refused() -> None:
    for rate in (7999, 48001, 0):
        with pytest.raises(ValueError, match=r"8000\.\.48000"):
            Frontend(rate)
    with pytest.raises(ValueError, match="shape"):
        Frontend(16000, mean=np.zeros(40, np.float32))
    with pytest.raises(ValueError, match="left_context"):
        FrontendConfig(left_context=5)
    with pytest.raises(ValueError, match="shift_ms"):
        FrontendConfig(shift_ms=0)
