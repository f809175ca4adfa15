"""A little of the work that a video bundle is for, to see what numbers its programs compute with (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from realtide.bundle import Bundle
from realtide.engines.longlive.config import cache_shapes, decoder_shapes
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.graphs import architecture
from realtide.engines.longlive.layout import DECODE, PASSES, TEXT_GRAPH
from realtide.engines.longlive.programs import FrameDecoder
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.runtime.program import Array, Runs
from realtide.engines.runtime.recording import shortened

PROMPTS = ("a cat walks over a red roof", "a yellow face smiles, then turns to the left")


def run(
    bundle: Bundle, program_of: Callable[[str, Mapping[str, Array]], Runs], *, pictures: bool = False
) -> str:
    """Make the transformer's part of a video: more blocks than the window holds, a change of prompt, a block.

    Args:
        bundle: whose video it is.
        program_of: runs a program, given its name and its state, which the program updates.
        pictures: decode the first frames too, as many as the window has.

    Returns:
        What was done; one clause.

    Raises:
        BundleError: the bundle has no tokenizer.
        ProgramError: a program cannot be run.
    """
    config, vae, _ = architecture(bundle.manifest.architecture)
    tokenizer = PromptTokenizer(bundle.asset("tokenizer"), config.transformer.text_tokens)
    keys = {
        name: np.zeros((rows, *shape), np.float32) for name, (rows, shape) in cache_shapes(config).items()
    }
    programs = PASSES.map(lambda name: program_of(name, {} if name == PASSES.prompt else keys))
    text = program_of(TEXT_GRAPH, {})
    decoder = None
    if pictures:
        shapes = decoder_shapes(vae, config.stream.height, config.stream.width)
        features = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        decoder = FrameDecoder(DECODE.map(lambda name: program_of(name, features)))
    stream = VideoStream(config, programs, keys, seed=1)
    for prompt, blocks in zip(PROMPTS, (config.stream.window // config.stream.block + 1, 1), strict=True):
        ids = tokenizer.encode(shortened(prompt, tokenizer.count, tokenizer.limit))
        stream.set_prompt(text.run({"ids": np.array(ids, np.int64)})["embeds"])
        for _ in range(blocks):
            for latent in stream.block():
                if decoder is not None and decoder.done < config.stream.window:
                    decoder.decode(latent)
    return f"a video of {stream.frames} latent frames, with another prompt for the last {config.stream.block}"
