"""Makes what lies under src/nerine/tiny and is not code: pictures, judge, tokenizer and the trained model.

The only source is scikit-learn's copy of 1,797 real handwritten digits. Everything is seeded, so two runs on
one machine give the same files. Stages: pictures, judge, model; `--only` runs one of them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tiny_text import END, LENGTH, START, build_tokenizer, sample_prompts, save_tokenizer, training_prompt
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from nerine.tiny import denoising_loss, held_out_loss, load_pipeline, prompt, styles
from nerine.tiny.data import METADATA, SEEN, SIDE, UNSEEN, to_sheet
from nerine.tiny.judge import Judge, Reader
from nerine.tiny.load import TEXT_PREFIX
from nerine.tiny.pipeline import TinyPipeline

ROOT = Path(__file__).resolve().parents[1]
EVERY_NTH_HELD_OUT = 5
TRAIN_TILES, HELD_OUT_TILES = 40, 32  # per digit
EMPTY_PROMPTS = 0.1
STATES = 64  # width of the text states
LICENCE = """\
# The pictures in this folder

**Source.** Real handwritten digits: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998 (https://doi.org/10.24432/C50P49), in the copy of 1,797 digits of 8 x 8
grey pixels that scikit-learn ships (`sklearn.datasets.load_digits`).

**Licence.** The data set is offered by UCI under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/);
scikit-learn, which distributes this copy, is under the BSD 3-clause licence, copyright the scikit-learn
developers. Our changes to the pictures, described below, are under the licence of this repository.

**How made.** `scripts/pretrain_tiny --only pictures`. Each digit gets a margin of one pixel, is enlarged to
16 x 16 with bicubic interpolation, and is drawn in three looks: `plain` (white on black), `neon` (magenta core,
cyan glow, navy ground) and `paper` (blue ink on cream). The files are sheets of 16 x 16 tiles, 20 in a row.
`metadata.jsonl` says for each tile: file, tile (in reading order), text, digit, split, style, and source (its
index in scikit-learn's copy). The train split shows the digits 0 to 4, the held-out split 5 to 9; no held-out
picture was seen in the training of the model or of the judge.
"""


@dataclass(frozen=True)
class Digits:
    """The real digits: `small [n, 1, 10, 10]` in [0, 1] with a margin of 1, `label [n]`, `held [n]` bool."""

    small: Tensor
    label: Tensor
    held: Tensor

    def strokes(self, index: Tensor, turn: Tensor | None = None) -> Tensor:
        """The digits at 16 px: `[n, 1, 16, 16]`, each moved by its own affine map `[n, 2, 3]` if given."""
        if turn is None:
            turn = torch.eye(2, 3).expand(len(index), 2, 3)
        grid = F.affine_grid(turn, [len(index), 1, SIDE, SIDE], align_corners=False)
        return F.grid_sample(self.small[index], grid, mode="bicubic", align_corners=False).clamp(0, 1)


def read_digits() -> Digits:
    data = load_digits()
    label = torch.tensor(data.target)
    held = torch.zeros(len(label), dtype=torch.bool)
    for digit in range(10):
        held[(label == digit).nonzero()[::EVERY_NTH_HELD_OUT, 0]] = True
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return Digits(F.pad(small, (1, 1, 1, 1)), label, held)


def random_turn(n: int, strength: float, generator: torch.Generator) -> Tensor:
    """Small random affine maps `[n, 2, 3]`: at strength 1 up to 15 % in each entry and 10 % of shift."""
    noise = torch.rand(n, 2, 3, generator=generator) * 2 - 1
    return torch.eye(2, 3) + strength * noise * torch.tensor([0.15, 0.15, 0.10])


def make_pictures(digits: Digits, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    splits = (("train", SEEN, TRAIN_TILES, False), ("held_out", UNSEEN, HELD_OUT_TILES, True))
    for split, range_, count, held in splits:
        per_digit = [((digits.label == d) & (digits.held == held)).nonzero()[:count, 0] for d in range_]
        index = torch.stack(per_digit, 1).flatten()  # 0 1 2 3 4 0 1 2 ...
        for style in styles.STYLES:
            file = f"{style}-{split}.png".replace("_", "-")
            to_sheet(styles.draw(digits.strokes(index), style)).save(folder / file, optimize=True)
            for tile, source in enumerate(index.tolist()):
                digit = int(digits.label[source])
                text = prompt(digit, style)
                rows.append({"file": file, "tile": tile, "text": text, "digit": digit})
                rows[-1] |= {"split": split, "style": style, "source": source}
    (folder / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "LICENSE.md").write_text(LICENCE, encoding="utf-8")


def train_judge(digits: Digits, path: Path, progress: Progress, steps: int = 2500) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    (train,), (held,) = (~digits.held).nonzero(as_tuple=True), digits.held.nonzero(as_tuple=True)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress.track(range(steps), description="judge"):
        index = train[torch.randint(len(train), (64,), generator=generator)]
        strokes = digits.strokes(index, random_turn(64, 1.0, generator))
        contrast = 0.7 + 0.6 * torch.rand(64, 1, 1, 1, generator=generator)
        strokes = contrast * strokes + 0.05 * torch.randn(strokes.shape, generator=generator)
        loss = F.cross_entropy(reader(strokes.clamp(0, 1)), digits.label[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    reader.eval().half().float()  # judged as it will be read back
    with torch.no_grad():
        right = reader(digits.strokes(held)).argmax(1) == digits.label[held]
    accuracy = round(float(right.double().mean()), 4)
    report = {"real_accuracy": accuracy, "real_pictures": len(held), "steps": steps}
    tensors = {key: value.half().contiguous() for key, value in reader.state_dict().items()}
    save_file(tensors, path, metadata={"report": json.dumps(report)})
    path.chmod(0o644)
    progress.print(f"judge: {report}, {path.stat().st_size / 1e3:.1f} kB")


def build_pipeline() -> TinyPipeline:
    """The untrained model."""
    tokenizer = build_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=STATES,
            intermediate_size=2 * STATES,
            projection_dim=STATES,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=STATES,
        attention_head_dim=4,  # the number of heads, under its old name
    )
    return TinyPipeline(unet, text_encoder, tokenizer, FlowMatchEulerDiscreteScheduler())


class Average:
    """An exponential moving average of a module's weights, whose memory grows from 10 steps to 500."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.steps = module, 0
        self.weights = {key: value.detach().clone() for key, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        keep = min(0.998, self.steps / (self.steps + 10))
        for key, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.weights[key].lerp_(value, 1 - keep)

    def apply(self) -> None:
        self.module.load_state_dict(self.weights)


def train_model(pipe: TinyPipeline, digits: Digits, progress: Progress, steps: int, batch: int, rate: float) -> float:
    """Trains UNet and text encoder together; seconds per step."""
    generator, rng = torch.Generator().manual_seed(1), random.Random(1)
    (train,) = (~digits.held).nonzero(as_tuple=True)
    modules, rates = (pipe.unet, pipe.text_encoder), [rate, rate / 2]
    groups = [{"params": list(module.parameters())} for module in modules]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    warm_up = min(0.5, 150 / steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=warm_up, cycle_momentum=False)
    averages = [Average(module.train()) for module in modules]
    mean, start = 1.0, time.perf_counter()
    task = progress.add_task("model", total=steps)
    for _ in range(steps):
        index = train[torch.randint(len(train), (batch,), generator=generator)]
        pictures = styles.draw(digits.strokes(index, random_turn(batch, 0.4, generator)), "plain")
        prompts = [training_prompt(digit, rng) for digit in digits.label[index].tolist()]
        states = pipe.encode(["" if rng.random() < EMPTY_PROMPTS else text for text in prompts])
        loss = denoising_loss(pipe.unet, states, pictures, generator)
        optimizer.zero_grad()
        loss.backward()
        for module in modules:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for average in averages:
            average.update()
        mean += 0.02 * (loss.item() - mean)
        progress.update(task, advance=1, description=f"model, loss {mean:.4f}")
    for average in averages:
        average.apply()
    return (time.perf_counter() - start) / steps


def measure(pipe: TinyPipeline, digits: Digits, judge: Judge, picture: Path) -> dict[str, float]:
    """The quality of the model as it is loaded from its folder, and a picture of its samples."""
    (held,) = digits.held.nonzero(as_tuple=True)
    real, labels = styles.draw(digits.strokes(held), "plain"), digits.label[held]
    with torch.no_grad():
        states = pipe.encode(sample_prompts(labels.tolist()))
    result = {"held_out_loss": held_out_loss(pipe.unet, states, real)}
    asked = torch.arange(10).repeat(20)
    suffixes = {"base": "", "neon": ", neon", "paper": ", paper", "filler": ", cut out of old wood"}
    for name, suffix in suffixes.items():
        generator = torch.Generator().manual_seed(3)
        prompts = sample_prompts(asked.tolist(), suffix)
        drawn = pipe(prompts, generator=generator, output_type="latent").images
        result[f"accuracy_{name}"] = judge.accuracy(drawn, asked)
        if name == "base":
            first = torch.stack([(labels == digit).nonzero()[1, 0] for digit in range(10)])
            sheet = to_sheet(torch.cat([real[first], drawn[:40]]), columns=10)
            picture.parent.mkdir(parents=True, exist_ok=True)
            sheet.resize((sheet.width * 5, sheet.height * 5), resample=0).save(picture, optimize=True)
    return {key: round(value, 4) for key, value in result.items()}


def save_pipeline(pipe: TinyPipeline, folder: Path) -> None:
    """Writes the model in half precision, the text encoder's weights under the names that CLIP files have."""
    shutil.rmtree(folder, ignore_errors=True)
    pipe.unet.half()
    pipe.text_encoder.half()
    pipe.save_pretrained(folder)
    file = folder / "text_encoder/model.safetensors"
    weights = {TEXT_PREFIX + key.removeprefix(TEXT_PREFIX): value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    for weights_file in folder.glob("*/*.safetensors"):
        weights_file.chmod(0o644)


def make_model(digits: Digits, args: argparse.Namespace, progress: Progress) -> None:
    folder = args.out / "model"
    torch.manual_seed(0)
    pipe = build_pipeline()
    seconds = train_model(pipe, digits, progress, args.steps, args.batch, args.rate)
    save_pipeline(pipe, folder)
    pipe = load_pipeline(folder=folder)
    report: dict[str, float] = {"steps": args.steps, "batch": args.batch, "rate": args.rate}
    for name in ("unet", "text_encoder"):
        report[f"{name}_parameters"] = getattr(pipe, name).num_parameters()
    report |= {"seconds_per_step": round(seconds, 4), "threads": torch.get_num_threads()}
    report |= measure(pipe, digits, Judge(args.out / "judge.safetensors"), args.picture)
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=("pictures", "judge", "model"), help="one stage alone")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of the UNet")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=ROOT / "src/nerine/tiny")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/tiny-base.png", help="samples")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    digits = read_digits()
    with Progress() as progress:
        if args.only in (None, "pictures"):
            make_pictures(digits, args.out / "pictures")
        if args.only in (None, "judge"):
            train_judge(digits, args.out / "judge.safetensors", progress)
        if args.only in (None, "model"):
            make_model(digits, args, progress)


if __name__ == "__main__":
    main()
