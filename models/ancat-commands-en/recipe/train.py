"""Train ANCAT or one of its baselines on a prepared pool (see README.md for the whole recipe; ours).

    DATA="--pool POOL --dev POOL... --cmvn FILE --tokenizer FILE"
    train.py $DATA --out DIR --draw wide --sets digits ... --plain               # first steps
    train.py $DATA --out DIR --init CKPT --draw mixed                            # common start
    train.py $DATA --out DIR --init CKPT --rule adaptive --algorithmic 0.02      # ANCAT
    train.py $DATA --out DIR --init CKPT --rule chunked --right 7                # a baseline

With ``torchrun --nproc-per-node N train.py ...`` each of N processes draws its own batches and gradients are
averaged; process 0 writes and evaluates.

The common start meets every rule (a rule is drawn for each step), so ANCAT and the baselines begin alike
and are then trained alike, with the same data, seed and number of steps; only the rule that opens arcs
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from batches import Corpus, corpus, make_batch, mixture
from lexicon import Lexicon
from pool import load_pool
from spectral import STRENGTHS
from torch import Tensor

from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.ancat.model import Transducer
from realtide.engines.ancat.offline import encode, hard_arcs
from realtide.engines.ancat.rnnt import fused_rnnt_loss
from realtide.engines.ancat.tokenizer import Tokenizer
from realtide.engines.ancat.training import ArcSampler, Schedule, average, losses

LOOK = 100  # utterances of a development set that are looked at while training, evenly spread
RULES: dict[str, dict[str, float]] = {
    "own": {},
    "wide": {"layerwise": 0.5, "chunked": 0.5},
    "mixed": {"adaptive": 0.45, "causal": 0.1, "layerwise": 0.15, "chunked": 0.3},
}  # chances with which a step draws its rule


def greedy(model: Transducer, encoded: Tensor, frames: Tensor, per_frame: int = 3) -> list[list[int]]:
    """Frame-synchronous greedy search over encoder rows [B, T, J] for looks while training -> token ids."""
    batch = encoded.shape[0]
    context = torch.zeros(batch, 2, dtype=torch.long)
    found: list[list[int]] = [[] for _ in range(batch)]
    for t in range(encoded.shape[1]):
        live = t < frames
        for _ in range(per_frame):
            token = model.joiner(encoded[:, t], model.predictor(context)).argmax(-1)
            emit = live & (token != 0)
            if not bool(emit.any()):
                break
            for b in emit.nonzero().flatten().tolist():
                found[b].append(int(token[b]))
            context = torch.where(emit.unsqueeze(1), torch.stack([context[:, 1], token], 1), context)
            live = emit
    return found


def distance(a: list[str], b: list[str]) -> int:
    """Edit distance between word lists."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@torch.no_grad()
def evaluate(
    model: Transducer, data: Corpus, tokenizer: Tokenizer, config: EncoderConfig, bias: float
) -> dict[str, float]:
    """Word error rate in percent, transducer loss in nats a token, mean arc weight; hard arcs at `bias`."""
    model.eval()
    wrong = count = 0
    weight, nats, tokens = [], 0.0, 0
    chosen = range(0, len(data.examples), -(-len(data.examples) // LOOK))
    order = sorted(chosen, key=lambda i: data.examples[i][2])
    for start in range(0, len(order), 24):
        picked = order[start : start + 24]
        batch = make_batch([(data, index) for index in picked], config, None)
        out = encode(model.encoder, batch.windows, batch.frames, hard_arcs(config, bias))
        weight.append(float(out.arcs.mean()) if config.right else 0.0)
        history = torch.nn.functional.pad(batch.targets, (2, 0))
        predicted = model.predictor(torch.stack([history[:, :-1], history[:, 1:]], -1))
        last = model.joiner.out
        nats += float(
            fused_rnnt_loss(
                out.rows, predicted, last.weight, last.bias, batch.targets, batch.frames, batch.lengths,
                reduction="sum",
            )
        )  # fmt: skip
        tokens += int((batch.lengths + 1).sum())
        for index, ids in zip(picked, greedy(model, out.rows, batch.frames), strict=True):
            record = data.examples[index][0]
            words, text = record.text.split(), tokenizer.decode(ids).split()
            wrong += distance(words, text)
            count += len(words)
    model.train()
    return {
        "wer": round(100 * wrong / max(1, count), 2),
        "nats": round(nats / max(1, tokens), 3),
        "arcs": round(float(np.mean(weight)), 3),
    }


def start_from(model: Transducer, path: Path, *, schedulers: bool = True) -> None:
    """Load a checkpoint of the common start.

    Position biases and schedulers' arcs beyond this model's right context are cut; a scheduler that it does
    not have is left out, as are all of them without `schedulers`. Raises ValueError for any other difference.
    """
    weights = torch.load(path, weights_only=True)["weights"]
    own = model.state_dict()
    kept = {}
    for name, value in weights.items():
        if name.startswith("ctc.") and (name not in own or own[name].shape != value.shape):
            continue  # a head of other units
        if ".scheduler." in name and not schedulers:
            continue
        if name not in own:
            if ".scheduler." not in name:
                raise ValueError(f"{path}: unexpected weight {name}")
            continue
        target = own[name]
        if name.endswith("relative") or ".scheduler.out." in name:
            value = value[tuple(slice(0, n) for n in target.shape)]
        if value.shape != target.shape:
            raise ValueError(
                f"{path}: weight {name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}"
            )
        kept[name] = value
    optional = ("ctc.",) if schedulers else ("ctc.", ".scheduler.")
    missing = [name for name in own if name not in kept and not any(part in name for part in optional)]
    if missing:
        raise ValueError(f"{path}: weight {missing[0]} is missing")
    model.load_state_dict({**own, **kept})


def mean_gradients(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """Average gradients over all processes, in place; one without a gradient counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, piece in zip(parameters, flat.div_(processes).split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--pool", type=Path, nargs="+", required=True, help="training pools, drawn from alike")
    parse.add_argument("--dev", type=Path, nargs="+", required=True, help="pools to look at while training")
    parse.add_argument("--cmvn", type=Path, required=True, help="mean and standard deviation of the features")
    parse.add_argument("--tokenizer", type=Path, required=True)
    parse.add_argument("--lexicon", type=Path, help="phonemes for the CTC head, as lexicon.py writes them")
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--init", type=Path, help="checkpoint of the common start")
    parse.add_argument("--fresh-schedulers", action="store_true", help="take all of CKPT but the schedulers")
    parse.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    parse.add_argument(
        "--draw", default="own", choices=list(RULES), help="how each step draws its rule; own: --rule"
    )
    parse.add_argument("--sets", nargs="*", help="train on these sets of the pool only")
    parse.add_argument(
        "--longest", type=int, default=1 << 30, help="leave out utterances with more encoder frames"
    )
    parse.add_argument("--plain", action="store_true", help="clips as they are, and no dropout")
    parse.add_argument("--vary", default="mild", choices=list(STRENGTHS), help="how much clips are varied")
    parse.add_argument("--dropout", type=float, default=0.1)
    parse.add_argument("--rule", default="adaptive", choices=["adaptive", "causal", "layerwise", "chunked"])
    parse.add_argument("--right", type=int, default=4)
    parse.add_argument("--steps", type=int, default=3000)
    parse.add_argument("--lr", type=float, default=2e-3)
    parse.add_argument("--warmup", type=int, default=300)
    parse.add_argument(
        "--frames", type=int, default=2400, help="encoder frames (40 ms) a batch, padding included"
    )
    parse.add_argument("--naive", type=float, default=0.0)
    parse.add_argument("--algorithmic", type=float, default=0.0)
    parse.add_argument("--compute", type=float, default=0.0)
    parse.add_argument(
        "--aligned-only", action="store_true", help="frames with known units are all there is to learn"
    )
    parse.add_argument(
        "--flat", action="store_true", help="guess word times that are not known (clean speech only)"
    )
    parse.add_argument(
        "--align", type=float, default=0.0, help="weight of the loss of frames with known units"
    )
    parse.add_argument("--rnnt", type=float, default=1.0, help="weight of the transducer's loss")
    parse.add_argument("--ctc", type=float, default=0.5, help="weight of the CTC head's loss")
    parse.add_argument("--fastemit", type=float, default=0.01)
    parse.add_argument("--hard-from", type=float, default=0.6)
    parse.add_argument("--evaluate-every", type=int, default=500)
    parse.add_argument("--biases", type=float, nargs="+", default=[0.0], help="dial settings to look at")
    parse.add_argument("--seed", type=int, default=7)
    parse.add_argument("--threads", type=int, default=1)
    args = parse.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if processes > 1:
        dist.init_process_group("gloo")
    rng = np.random.default_rng(args.seed + 1000 * rank)
    generator = torch.Generator().manual_seed(args.seed + 1000 * rank)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = Tokenizer(args.tokenizer)
    common = args.draw != "own"
    right = 15 if common else 0 if args.rule == "causal" else args.right
    config = EncoderConfig(rule="adaptive" if common else args.rule, right=right, vocab=tokenizer.vocabulary)
    cmvn = np.load(args.cmvn)
    lexicon = Lexicon(args.lexicon) if args.lexicon else None
    trains, devs = (
        [corpus(load_pool(path), tokenizer, cmvn, config.stride, lexicon) for path in paths]
        for paths in (args.pool, args.dev)
    )
    schedule = Schedule(
        steps=args.steps, peak_lr=args.lr, warmup=args.warmup, naive=args.naive, algorithmic=args.algorithmic,
        compute=args.compute, fastemit=args.fastemit, hard_from=args.hard_from, mixed=RULES[args.draw],
        dropout=0.0 if args.plain else args.dropout, align_weight=args.align,
        rnnt_weight=0.0 if args.aligned_only else args.rnnt,
        ctc_weight=0.0 if args.aligned_only else args.ctc,
    )  # fmt: skip
    for train in trains:
        train.examples = [
            (record, ids, frames)
            for record, ids, frames in train.examples
            if frames <= args.longest and (not args.sets or record.set in args.sets)
        ]
    units = lexicon.size if lexicon else None
    model = Transducer(config, units)
    if args.init:
        start_from(model, args.init, schedulers=not args.fresh_schedulers)
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for weight in model.parameters():
        (decay if weight.ndim > 1 else plain).append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=schedule.peak_lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    shadow = {name: value.clone() for name, value in model.state_dict().items()}
    first = 0
    if args.resume and (args.out / "last.pt").exists():
        saved = torch.load(args.out / "last.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        shadow, first = saved["weights"], saved["step"]
    log = (args.out / "log.jsonl").open("a")

    def report(values: dict[str, object]) -> None:
        if rank:
            return
        log.write(json.dumps(values) + "\n")
        log.flush()

    def save(step: int) -> None:
        state = {
            "weights": shadow,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        torch.save(state | {"config": config.to_dict()}, args.out / "last.tmp")
        (args.out / "last.tmp").rename(args.out / "last.pt")

    def look(step: int) -> None:
        twin = Transducer(config, units)
        twin.load_state_dict(shadow)
        for bias in args.biases if config.rule == "adaptive" else (0.0,):
            for path, dev in zip(args.dev, devs, strict=True):
                report(
                    {
                        "step": step,
                        "dev": path.name,
                        "bias": bias,
                        **evaluate(twin, dev, tokenizer, config, bias),
                    }
                )

    names = list(schedule.mixed) or [config.rule]
    chances = np.array([schedule.mixed.get(name, 1.0) for name in names])
    began, sums, counts = time.monotonic(), dict[str, float](), dict[str, int]()
    stream = mixture(trains, args.frames, rng)
    for step in range(first, args.steps):
        picked = next(stream)
        variation = None if args.plain else rng
        batch = make_batch(picked, config, variation, flat=args.flat, strength=STRENGTHS[args.vary])
        rule = str(rng.choice(names, p=chances / chances.sum()))
        sampler = ArcSampler(config, schedule, step / args.steps, rule, generator, len(picked))
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        parts = losses(model, batch, sampler, schedule, bf16=True)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(parts["total"])
        if processes > 1:
            mean_gradients([*decay, *plain], processes)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        if not bool(torch.isfinite(norm)):
            report({"step": step, "skipped": f"loss or gradient is not finite ({rule})"})
            continue
        optimizer.step()
        average(shadow, model, min(0.998, (1 + step - first) / (10 + step - first)))
        for name, value in parts.items():
            counts[name] = counts.get(name, 0) + 1
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if (step + 1) % 50 == 0:
            means = {name: round(total / counts[name], 4) for name, total in sums.items()}
            report({"step": step + 1, "seconds": round(time.monotonic() - began, 1), **means})
            sums, counts = {}, {}
        if rank:
            continue
        if (step + 1) % 250 == 0:
            save(step + 1)
        if (step + 1) % args.evaluate_every == 0:
            look(step + 1)
    if rank:
        return
    save(args.steps)
    (args.out / "run.json").write_text(
        json.dumps({"config": config.to_dict(), "arguments": {k: str(v) for k, v in vars(args).items()}})
    )
    torch.save({"weights": shadow, "config": replace(config).to_dict()}, args.out / "final.pt")


if __name__ == "__main__":
    main()
