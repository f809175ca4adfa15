"""The speech bundle that ships: whole, the same in every chunking, and its graph is the offline encoder."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from realtide.bench.encoder import EncoderBench, windows_of
from realtide.bundle import Precision, load_bundle, verify
from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.engine import AncatEngine, load
from realtide.engines.ancat.model import Encoder
from realtide.engines.ancat.offline import encode, hard_arcs
from realtide.engines.ancat.session import SpeechSession
from realtide.engines.ancat.types import Audio, Final, Finish, SpeechEvent, SpeechInput, SpeechOptions
from realtide.engines.runtime.plan_key import Gpu
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.weights import WeightFile
from realtide.plan_building import BundlePlans
from tests.engines.runtime.tensorrt_package import installed

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "models" / "ancat-commands-en"
AUDIO = ROOT / "tests" / "data" / "audio"
CLIPS = list(csv.DictReader((AUDIO / "clips.tsv").read_text(encoding="utf-8").splitlines(), delimiter="\t"))


def ignore(stage: str, seconds: float, batch: int) -> None:
    """A stage timer."""


@pytest.fixture(scope="module")
def engine() -> AncatEngine:
    return load(BUNDLE, slots=len(CLIPS), max_batch=len(CLIPS))


def transcribe(engine: AncatEngine, milliseconds: int | None) -> dict[str, list[Final]]:
    """All clips at once, in chunks or whole."""
    streams: dict[str, tuple[SpeechSession, list[SpeechInput]]] = {}
    for clip in CLIPS:
        samples, rate = soundfile.read(AUDIO / clip["file"], dtype="float32")
        size = len(samples) if milliseconds is None else rate * milliseconds // 1000
        session = engine.open(SpeechOptions(sample_rate=rate))
        chunks = [Audio(samples[k : k + size], 0.0) for k in range(0, len(samples), size)]
        streams[clip["file"]] = (session, [*chunks, Finish()])
    events: dict[str, list[SpeechEvent]] = {name: [] for name in streams}
    while not all(session.done for session, _ in streams.values()):
        for name, (session, left) in streams.items():
            if left:
                events[name].extend(session.push(left.pop(0)))
        ready = [name for name, (session, _) in streams.items() if session.runnable()]
        if ready:
            for name, new in zip(ready, engine.step([streams[n][0] for n in ready], ignore), strict=True):
                events[name].extend(new)
    for session, _ in streams.values():
        session.close()
    return {name: [e for e in all_ if isinstance(e, Final)] for name, all_ in events.items()}


def test_the_bundle_is_whole() -> None:
    assert verify(load_bundle(BUNDLE)) == []


def test_every_chunking_says_the_same_and_most_words_are_right(engine: AncatEngine) -> None:
    short, whole = transcribe(engine, 37), transcribe(engine, None)
    right = total = 0
    for clip in CLIPS:
        one, two = short[clip["file"]], whole[clip["file"]]
        assert [(f.text, f.reason, f.utterance) for f in one] == [
            (f.text, f.reason, f.utterance) for f in two
        ]
        assert [(w.text, w.start, w.end) for f in one for w in f.words] == [
            (w.text, w.start, w.end) for f in two for w in f.words
        ]
        said = " ".join(f.text for f in one).split()
        if clip["set"] in ("fsdd", "wakeword", "coffee"):
            total += 1
            right += said == clip["text"].split()
    assert right >= total - 2  # clips of the commands it was made for; LibriSpeech and long prompts are not
    assert engine.free_slots == engine.slots


def test_words_are_the_same_with_all_state_on_a_device(engine: AncatEngine) -> None:
    device = load(BUNDLE, slots=len(CLIPS), max_batch=len(CLIPS), backend="torch", device="cpu")
    assert texts(transcribe(device, 100)) == texts(transcribe(engine, 100))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_words_are_the_same_from_plans(engine: AncatEngine, precision: Precision, tmp_path: Path) -> None:
    count, gpu = len(CLIPS), Gpu("NVIDIA H100 80GB HBM3", "9.0", "570.86")
    with installed([]):
        plans = BundlePlans(load_bundle(BUNDLE), precision, PlanCache(tmp_path / "plans"), gpu, count, True)
        planned = load(
            BUNDLE, slots=count, max_batch=count, backend="tensorrt", precision=precision, plan_of=plans
        )
        found = transcribe(planned, 100)
    assert texts(found) == texts(transcribe(engine, 100))


def texts(finals: dict[str, list[Final]]) -> dict[str, list[str]]:
    """What was said in each clip."""
    return {name: [final.text for final in found] for name, found in finals.items()}


@pytest.mark.parametrize("seed", [None, 7])
def test_later_commands_of_a_stream_are_heard_as_well_as_the_first(
    engine: AncatEngine, seed: int | None
) -> None:
    """Three commands with pauses of 1 and 2.5 s, in digital silence and in a room's hush."""
    order = next(clip for clip in CLIPS if clip["file"] == "coffee-mocha.flac")
    samples, rate = soundfile.read(AUDIO / order["file"], dtype="float32")
    pauses = [np.zeros(int(seconds * rate), np.float32) for seconds in (1.0, 2.5, 1.0)]
    wave = np.concatenate([part for pause in pauses for part in (samples, pause)])
    if seed is not None:
        wave += np.random.default_rng(seed).standard_normal(len(wave)).astype(np.float32) * 0.001
    session = engine.open(SpeechOptions(sample_rate=rate))
    for item in (Audio(wave, 0.0), Finish()):
        session.push(item)
    finals: list[SpeechEvent] = []
    while not session.done:
        finals += [e for e in engine.step([session], ignore)[0] if isinstance(e, Final) and e.text]
    session.close()
    said = " ".join(final.text for final in finals if isinstance(final, Final))
    assert said == " ".join([order["text"]] * 3)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The PyTorch encoder with the weights that ship."""
    bundle = load_bundle(BUNDLE)
    weights = WeightFile(bundle.weights)
    model = Encoder(EncoderConfig.from_dict(bundle.manifest.architecture["encoder"]))
    model.load_state_dict(
        {
            name: torch.from_numpy(np.asarray(weights[f"encoder.{name}"], np.float32))
            for name in model.state_dict()
        }
    )
    return model.eval()


@pytest.fixture(scope="module")
def graph() -> EncoderBench:
    """The encoder's graph that ships, for one stream."""
    return EncoderBench.of_bundle(BUNDLE, 1, "float32")


@pytest.mark.parametrize("clip", [clip["file"] for clip in CLIPS])
@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0])
def test_the_streaming_graph_is_the_offline_encoder(
    encoder: Encoder, graph: EncoderBench, clip: str, bias: float
) -> None:
    samples, rate = soundfile.read(AUDIO / clip, dtype="float32")
    everything = windows_of(samples, rate, BUNDLE, 1)
    with torch.no_grad():
        lengths = torch.tensor([everything.shape[1]])
        offline = encode(encoder, torch.from_numpy(everything), lengths, hard_arcs(encoder.config, bias))
    for frames in (1, 3, 12):
        rows = graph.play(everything, frames, bias=bias).rows
        assert rows.shape == offline.rows[0].shape
        assert float(np.abs(rows - offline.rows[0].numpy()).max()) <= 1e-4, f"{frames} frames a step"
