"""Public checkpoints become bundles: every layout, every name and shape, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from realtide.bundle import load_bundle, verify
from realtide.engines.longlive import convert, convert_names, layout
from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
)
from realtide.engines.longlive.convert import Card, Model, Sources
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.programs import FrameDecoder
from realtide.engines.longlive.replay import replay
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import WanVae
from realtide.engines.runtime.checkpoint_files import ConvertError, Stored, read_checkpoint
from realtide.engines.runtime.weights import WeightFile
from tests.engines.longlive import checkpoints
from tests.engines.longlive.checkpoints import Weights
from tests.engines.longlive.conftest import GOLDEN

CARD = Card("converted", "1.0.0", "Golden weights.", "Apache-2.0", "this test")
STREAM = StreamConfig(height=8, width=12)
NAMES = Path(__file__).parents[2] / "data" / "longlive" / "diffusers_names.json"


def whole_vae() -> Weights:
    """The golden decoder and some encoder."""
    torch.manual_seed(0)
    config = VaeConfig(dim=8, latent=16, mean=convert_names.WAN_MEAN, std=convert_names.WAN_STD)
    return WanVae(config).state_dict() | checkpoints.golden("wan_vae_weights_seed31")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Files as LongLive and Wan2.1 release them."""
    directory = tmp_path_factory.mktemp("release")
    weights = checkpoints.golden("weights_seed7")
    generator = {f"model.{name}": value for name, value in weights.items()}
    torch.save({"generator": generator, "step": 3}, directory / "longlive_base.pt")
    torch.save(whole_vae(), directory / "Wan2.1_VAE.pth")
    torch.save(checkpoints.golden("umt5_weights_seed41"), directory / "models_t5_umt5-xxl-enc-bf16.pth")
    checkpoints.tokenizer(directory / "google" / "umt5-xxl")
    found = convert.find(directory)
    assert set(found) == {"vae", "text", "tokenizer"}
    base = directory / "longlive_base.pt"
    return Sources(base, found["vae"], found["text"], found["tokenizer"], heads=4)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The same in diffusers' layout, the text encoder in shards."""
    directory = tmp_path_factory.mktemp("diffusers")
    weights = checkpoints.diffusers_transformer(checkpoints.golden("weights_seed7"))
    name = "diffusion_pytorch_model"
    settings = {"num_attention_heads": 4, "eps": 1e-6}
    checkpoints.save_directory(weights, directory / "transformer", name, settings, 2)
    frames = checkpoints.diffusers_vae(whole_vae(), 2)
    statistics = {"latents_mean": convert_names.WAN_MEAN, "latents_std": convert_names.WAN_STD}
    checkpoints.save_directory(frames, directory / "vae", name, statistics, 1)
    words = checkpoints.transformers_text(checkpoints.golden("umt5_weights_seed41"))
    checkpoints.save_directory(words, directory / "text_encoder", "model", {}, 3)
    checkpoints.tokenizer(directory / "tokenizer")
    found = convert.find(directory)
    assert set(found) == {"transformer", "vae", "text", "tokenizer"}
    return Sources(found["transformer"], found["vae"], found["text"], found["tokenizer"])


def written(model: Model, out: Path, **options: object) -> Path:
    convert.write(model, out, CARD, STREAM, **options)  # type: ignore[arg-type]
    return out


def check_replays(bundle: Path, directory: Path) -> None:
    """Golden cases over a bundle's weights give what the reference computes."""
    directory.mkdir()
    weights = load_file(load_bundle(bundle).weights)
    for prefix, kept, case in (
        (layout.TRANSFORMER, "", "switch_recached_sink"),
        (layout.VAE, r"decoder\.|conv2\.", "wan_vae_seed31"),
        (layout.TEXT, "", "umt5_seed41"),
    ):
        part = {
            name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)
        }
        part = {name: value for name, value in part.items() if re.match(kept, name)}
        save_file(part, directory / f"{prefix}weights.safetensors")
        shutil.copy(GOLDEN / f"{case}.safetensors", directory)
        assert replay(directory / f"{case}.safetensors").ok


@pytest.mark.parametrize("name", ["release", "diffusers"])
def test_golden_weights_in_every_layout_give_golden_results(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = convert.read(request.getfixturevalue(name), text_tokens=16)
    assert model.transformer == TransformerConfig(
        layers=3, dim=128, heads=4, ff_dim=256, freq_dim=64, text_dim=48, text_tokens=16
    )
    assert model.vae == VaeConfig(dim=8, mean=convert_names.WAN_MEAN, std=convert_names.WAN_STD)
    assert model.text == TextConfig(vocab=96, dim=48, attention_dim=48, ff_dim=112, heads=4, layers=3)
    seen: list[tuple[str, int]] = []
    out = written(
        model, tmp_path / "bundle", precision="float32", on_tensor=lambda *tensor: seen.append(tensor)
    )
    bundle = load_bundle(out)
    assert verify(bundle) == []
    assert bundle.manifest.architecture["transformer"] == model.transformer.to_dict()
    assert bundle.manifest.architecture["video"] == {"frames_per_second": 16.0}
    assert bundle.asset("tokenizer").name == "tokenizer.model"
    assert sum(size for _, size in seen) == 4 * sum(map(model.parameters, ("transformer.", "vae.", "text.")))
    check_replays(out, tmp_path / "cases")


def test_averaged_weights_of_a_wrapped_model_are_taken_on_demand(release: Sources, tmp_path: Path) -> None:
    weights = checkpoints.golden("weights_seed7")
    wrapped = {
        re.sub(r"^(blocks\.\d+\.)", r"_fsdp_wrapped_module.\1_fsdp_wrapped_module.", name): value
        for name, value in weights.items()
    }
    averaged = {f"model.{name}": value + 1 for name, value in wrapped.items()}
    only = {f"model._fsdp_wrapped_module.{name}": value for name, value in weights.items()}
    generator = {f"model.{name}": value for name, value in weights.items()}
    torch.save({"generator": generator, "generator_ema": averaged}, tmp_path / "both.pt")
    torch.save({"generator_ema": only}, tmp_path / "ema.pt")
    for file, ema, added in (("both.pt", False, 0), ("both.pt", True, 1), ("ema.pt", False, 0)):
        model = convert.read(replace(release, transformer=tmp_path / file, ema=ema), 16)
        for name, value in weights.items():
            assert torch.equal(model.tensors[f"transformer.{name}"].read(), value + added), name
    with pytest.raises(ConvertError, match=r"longlive_base\.pt: 'generator' is no tensor"):
        convert.read(replace(release, ema=True), 16)


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("base", ["release", "diffusers"])
def test_low_rank_updates_are_merged(
    base: str, wrapped: bool, alpha: float | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    weights = checkpoints.golden("weights_seed7")
    updates = checkpoints.lora(weights, rank=4)
    assert len(updates) == 2 * 3 * 10  # ten linear layers in each of three blocks
    torch.save({"generator_lora": updates} if wrapped else updates, tmp_path / "lora.pt")
    sources = replace(request.getfixturevalue(base), lora=tmp_path / "lora.pt", lora_alpha=alpha)
    model = convert.read(sources, 16)
    out = written(model, tmp_path / "bundle", precision="float32")
    found = load_file(out / "weights.safetensors")
    for name, value in weights.items():
        want = value.double().numpy()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in updates:
            down, up = (updates[f"{stem}.lora_{half}.weight"].double().numpy() for half in "AB")
            want = want + (1.0 if alpha is None else alpha / 4) * up @ down
            assert not np.allclose(value, want, atol=1e-3)
        np.testing.assert_allclose(found[f"transformer.{name}"], want, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_weights_are_stored_in_half_precision(precision: str, release: Sources, tmp_path: Path) -> None:
    out = written(convert.read(release, 16), tmp_path / "bundle", precision=precision)
    stored, served = load_file(out / "weights.safetensors"), WeightFile(out / "weights.safetensors")
    weights = checkpoints.golden("weights_seed7")
    for name, value in weights.items():
        half = value.to(getattr(torch, precision))
        assert torch.equal(stored[f"transformer.{name}"], half)
        np.testing.assert_array_equal(np.float32(served[f"transformer.{name}"]), half.float().numpy())
    assert {value.dtype for value in stored.values()} == {getattr(torch, precision)}


def test_a_bundle_with_graphs_is_served(release: Sources, tmp_path: Path) -> None:
    """Graphs that were exported without weights compute what the modules do."""
    from realtide.engines.longlive import engine

    torch.manual_seed(0)
    small = {
        "transformer": WanTransformer(
            TransformerConfig(layers=1, dim=24, heads=2, ff_dim=40, freq_dim=16, text_dim=12)
        ),
        "vae": WanVae(
            VaeConfig(
                dim=4, multipliers=(1, 2), residual_blocks=1, temporal=(True,),
                mean=convert_names.WAN_MEAN, std=convert_names.WAN_STD,
            )
        ),
        "text": TextEncoder(TextConfig(vocab=60, dim=12, attention_dim=8, ff_dim=20, heads=2, layers=1)),
    }  # fmt: skip
    for part, module in small.items():
        torch.save(module.state_dict(), tmp_path / f"{part}.pt")
    transformer, vae, text = (tmp_path / f"{part}.pt" for part in ("transformer", "vae", "text"))
    model = convert.read(Sources(transformer, vae, text, release.tokenizer, heads=2), 16)
    out = written(model, tmp_path / "bundle", precision="float32", graphs=("float32",), check=False)
    manifest = load_bundle(out).manifest
    assert set(manifest.programs) == set(layout.PROGRAMS)
    assert manifest.precisions == ("float32",)
    served, modules = (engine.load(out, slots=1, backend=name) for name in ("onnxruntime", "torch"))
    try:
        embeds = served._parts.embed("a cat walks")
        np.testing.assert_allclose(embeds, modules._parts.embed("a cat walks"), atol=1e-4)
        blocks = []
        for loaded in (served, modules):
            cache = loaded._parts.caches.first
            stream = VideoStream(VideoConfig(model.transformer, STREAM), cache.programs, cache.keys, seed=1)
            stream.set_prompt(embeds)
            latents = [stream.block() for _ in range(3)]
            stream.set_prompt(2 * embeds)
            latents.append(stream.block())
            decoder = FrameDecoder(cache.decoder)
            frames = [decoder.decode(latent) for latent in latents[0]]
            blocks.append([*latents, *frames])
        for have, want in zip(*blocks, strict=True):
            np.testing.assert_allclose(have, want, atol=1e-4)
    finally:
        served.close()
        modules.close()


Change = Callable[[Weights], None]


def drop(name: str) -> Change:
    def change(weights: Weights) -> None:
        del weights[name]

    return change


def put(name: str, *shape: int) -> Change:
    return lambda weights: weights.update({name: torch.zeros(*shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.blocks.1.ffn.0.weight"), r"base\.pt\): 'blocks.1.ffn.0.weight' is missing$"),
        (drop("model.patch_embedding.weight"), "transformer: 'patch_embedding.weight' is missing"),
        (
            put("model.blocks.0.cross_attn.k_img.weight", 2),
            "'model.blocks.0.cross_attn.k_img.weight' is unexpected$",
        ),
        (put("model.blocks.2.norm3.bias", 64), r"'model.blocks.2.norm3.bias' is \[64\], not \[128\]$"),
        (put("model.blocks.4.norm3.bias", 128), r"'blocks.3.cross_attn.k.bias' is missing \(and 52 more"),
        (put("model.patch_embedding.weight", 128, 16, 2, 2, 2), r"patches of \[2, 2, 2\] are not supp"),
        (put("model.patch_embedding.weight", 128), r"is \[128\], not 5-dimensional"),
    ],
)
def test_every_name_and_shape_is_checked(
    change: Change, message: str, release: Sources, tmp_path: Path
) -> None:
    weights: Weights = torch.load(release.transformer, weights_only=True)["generator"]
    change(weights)
    torch.save({"generator": weights}, tmp_path / "base.pt")
    with pytest.raises(ConvertError, match=message):
        convert.read(replace(release, transformer=tmp_path / "base.pt"), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("base_model.model.blocks.1.ffn.2.lora_B.weight"), "'blocks.1.ffn.2.lora_B.weight' is missing"),
        (put("base_model.model.head.head.lora_A.weight", 4, 128), "head.head.lora_A.weight' is unexpected"),
        (
            put("base_model.model.blocks.1.self_attn.q.lora_A.weight", 2, 128),
            r"is \[2, 128\], not \[4, 128\]",
        ),
        (
            put("base_model.model.blocks.1.self_attn.q.lora_B.weight", 128, 2),
            r"is \[128, 2\], not \[128, 4\]",
        ),
    ],
)
def test_every_update_is_checked(change: Change, message: str, release: Sources, tmp_path: Path) -> None:
    updates = checkpoints.lora(checkpoints.golden("weights_seed7"), rank=4)
    change(updates)
    torch.save(updates, tmp_path / "lora.pt")
    with pytest.raises(ConvertError, match=message):
        convert.read(replace(release, lora=tmp_path / "lora.pt"), 16)


class Code:
    """What a pickle must not hold."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def test_pickles_hold_tensors_and_nothing_else(
    release: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": {"model.x": torch.ones(2)}, "config": Code()}, tmp_path / "code.pt")
    with pytest.raises(ConvertError, match=r"code\.pt: holds posix\.system; "):
        convert.read(replace(release, transformer=tmp_path / "code.pt"), 16)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pt").write_text("text")
    for file, message in (
        ("text.pt", "text.pt: (is no checkpoint|cannot be read)"),
        ("nothing.pt", "no such file"),
    ):
        with pytest.raises(ConvertError, match=message):
            convert.read(replace(release, vae=tmp_path / file), 16)
    torch.save({"a": 1}, tmp_path / "number.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ConvertError, match=r"'a' is no tensor \(nor is there 'generator'\)"):
        read_checkpoint(tmp_path / "number.pt", ["generator"])
    with pytest.raises(ConvertError, match="holds no tensors by name"):
        read_checkpoint(tmp_path / "list.pt")


def test_files_of_old_pytorch_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pt")["a"].read().tolist() == [0, 1, 2]


def test_directories_are_one_file_or_an_index_of_several(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    checkpoints.save_directory(weights, tmp_path / "m", "model", {}, 2)
    assert set(read_checkpoint(tmp_path / "m")) == {"a", "b"}
    index = tmp_path / "m" / "model.safetensors.index.json"
    first = "model-00001-of-00002.safetensors"
    for text, message in (
        ("{}", "has no weight_map"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}), "must be a file beside the index"),
        (json.dumps({"weight_map": {"a": first, "c": first}}), "lacks 'c'"),
        (json.dumps({"weight_map": {"a": "model-00003.safetensors"}}), "No such file"),
    ):
        index.write_text(text)
        with pytest.raises(ConvertError, match=message):
            read_checkpoint(tmp_path / "m")
    index.unlink()
    with pytest.raises(ConvertError, match=r"one \.safetensors file, or an index"):
        read_checkpoint(tmp_path / "m")
    (tmp_path / "m" / first).write_bytes(b"short")
    with pytest.raises(ConvertError, match=first):
        read_checkpoint(tmp_path / "m" / first)


def test_parts_must_fit_each_other(release: Sources, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = TextEncoder(TextConfig(vocab=96, dim=32, attention_dim=16, ff_dim=20, heads=2, layers=1))
    torch.save(small.state_dict(), tmp_path / "text.pt")
    with pytest.raises(ConvertError, match="gives 32 numbers a token, the transformer takes 48"):
        convert.read(replace(release, text=tmp_path / "text.pt"), 16)
    few = TextEncoder(TextConfig(vocab=9, dim=48, attention_dim=16, ff_dim=20, heads=2, layers=1))
    torch.save(few.state_dict(), tmp_path / "text.pt")
    with pytest.raises(ConvertError, match=r"spiece\.model: has \d+ pieces, the text encoder knows 9"):
        convert.read(replace(release, text=tmp_path / "text.pt"), 16)
    vae = WanVae(VaeConfig(dim=4, latent=3, mean=(0.0,) * 3, std=(1.0,) * 3))
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    with pytest.raises(ConvertError, match="nothing says the mean and deviation of its 3 latent channels"):
        convert.read(replace(release, vae=tmp_path / "vae.pt"), 16)
    with pytest.raises(ConvertError, match=r"must be a multiple of transformer\.heads"):
        convert.read(replace(release, heads=5), 16)


def test_nothing_is_left_behind(release: Sources, tmp_path: Path) -> None:
    model = convert.read(release, 16)
    out = tmp_path / "bundles" / "bundle"
    large = torch.full((128,), 1e6)
    name = "transformer.blocks.0.norm3.bias"
    spoilt = replace(model, tensors=model.tensors | {name: replace(model.tensors[name], read=lambda: large)})
    with pytest.raises(ConvertError, match=r"'model\.blocks\.0\.norm3\.bias' is not finite in float16"):
        written(spoilt, out, precision="float16")
    with pytest.raises(ConvertError, match=r"manifest\.yaml: name: "):
        convert.write(model, out, replace(CARD, name="No Slug"), STREAM)
    with pytest.raises(ConvertError, match=r"stream\.height \(7\) must be a multiple"):
        convert.write(model, out, CARD, StreamConfig(height=7, width=12))
    assert list(out.parent.iterdir()) == []
    written(model, out)
    before = (out / "manifest.yaml").read_bytes()
    with pytest.raises(ConvertError, match="exists already"):
        written(model, out)
    assert (out / "manifest.yaml").read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def shapes_only(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    def read() -> torch.Tensor:
        raise AssertionError("read")

    return {name: Stored(name, Path("x"), tuple(shape), read) for name, shape in shapes.items()}


def meta(make: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in make().state_dict().items()}


def test_the_full_size_is_recognized_by_shapes_alone() -> None:
    """Wan2.1-T2V-1.3B and UMT5-xxl, in both layouts; diffusers' names were written by diffusers itself."""
    transformer, text = TransformerConfig(), TextConfig()
    vae = VaeConfig(mean=convert_names.WAN_MEAN, std=convert_names.WAN_STD)
    own = {
        "transformer": meta(lambda: WanTransformer(transformer)),
        "vae": meta(lambda: WanVae(vae)),
        "text": meta(lambda: TextEncoder(text)),
    }
    templates = json.loads(NAMES.read_text())
    for names in (own, {part: expanded(names) for part, names in templates.items()}):
        found = {part: shapes_only(shapes) for part, shapes in names.items()}
        config, tensors = convert_names.transformer(found["transformer"], {}, None, 512)
        assert (config, set(tensors)) == (transformer, set(own["transformer"]))
        frames, tensors = convert_names.vae(found["vae"], {})
        assert (frames, set(tensors)) == (vae, set(own["vae"]))
        words, tensors = convert_names.text(found["text"], {})
        assert (words, set(tensors)) == (text, set(own["text"]))
        updates = {
            f"base_model.model.{stem.removesuffix('.weight')}.lora_{half}.weight": shape
            for stem, (out, into, *_) in ((n, (*s, 0)) for n, s in own["transformer"].items() if len(s) == 2)
            if stem.startswith("blocks.")
            for half, shape in (("A", (256, into)), ("B", (out, 256)))
        }
        assert len(updates) == 600
        merged = convert_names.merged(shapes_only(own["transformer"]), shapes_only(updates), 256.0)
        assert set(merged) == set(own["transformer"])
    counts = {part: sum(int(np.prod(shape)) for shape in shapes.values()) for part, shapes in own.items()}
    assert counts == {"transformer": 1_418_996_800, "vae": 126_892_531, "text": 5_680_910_336}


def expanded(names: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Names with a star stand for all blocks."""
    blocks = 30 if any(name.startswith("blocks.") for name in names) else 24
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in names.items():
        for number in range(blocks if "*" in name else 1):
            found[name.replace("*", str(number))] = tuple(shape)
    return found
