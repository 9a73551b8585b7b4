"""Train the bundled model, `interp/assets/tiny`, from nothing.

    python experiments/train_tiny.py --out interp/assets/tiny --seed 0

The model is a LLaVA in miniature: a CLIP vision encoder, a two-layer projector, a Llama. Its parts
are trained one after the other, as its big sisters' are, and only ever on words that a person
could write under a picture:

1. **Encoder** (`train_encoder`). It learns the words of a caption: the kind of land in each ninth
   of the picture ("water top left, woods in the centre") and the names of the classes that the
   picture holds ("sea, lake, forest"). Binary cross-entropy on the mean of its tokens, which is
   one vector an image. Then it is frozen, and the adapter reads its layer `READ`.
2. **Projector and language model** (`train_language`). They learn together to answer questions in
   words, by next-token cross-entropy on the answers: which classes are in the picture, and what
   lies along a row (see `tiny_questions`). Of the row questions, `NARROW` see only the patches of
   their own row: what those patches do not hold cannot be looked up elsewhere when the answer is
   written, so whatever the rest of the picture says about a row has to be carried there.

No label of a patch is ever a target. No loss touches an image token's state: what the tokens come
to hold, they hold because it helps to find words. That is what makes probing them a question.

Everything is drawn from `--seed`. Needs torch, transformers, NumPy, Pillow and scikit-learn. One
thread takes about 15 minutes; two threads on two busy cores are slower than one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_questions as tq
from tiny_model import READ, build_model, pixels_of, save

from interp.datasets.scenes import CLASSES, GRID, SIBLINGS, SIZE, scenes

ROWS = 6  # row captions asked for of a picture each time it comes up
NARROW = 0.7  # share of them that may look at nothing but their row
HELD_OUT = 256  # train scenes kept aside to compare seeds by their caption loss


N_WORDS = 9 * len(SIBLINGS) + len(CLASSES)


def caption_words(mask: NDArray[np.uint8]) -> Tensor:
    """[55] which words a caption of the picture has: what the encoder is asked.

    The kind of land (water, woods, grass, sand, white: the sibling pairs) in each ninth of the
    picture, and the names of the classes of the whole picture.
    """
    edges = np.linspace(0, SIZE, 4).round().astype(int)
    words = np.zeros((9, len(SIBLINGS)), np.float32)
    for i in range(9):
        r, c = divmod(i, 3)
        part = mask[edges[r] : edges[r + 1], edges[c] : edges[c + 1]]
        words[i] = np.bincount(part.ravel() // 2, minlength=len(SIBLINGS)) >= 40
    names = np.bincount(mask.ravel(), minlength=len(CLASSES)) > 0
    return torch.from_numpy(np.concatenate([words.ravel(), names.astype(np.float32)]))


class Log:
    """Prints every `EVERY`th step and keeps the curves of mean losses for training.json."""

    EVERY = 50

    def __init__(self) -> None:
        self.start = time.time()
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._recent: list[float] = []

    def __call__(self, stage: str, step: int, loss: Tensor) -> None:
        self._recent.append(loss.item())
        if (step + 1) % self.EVERY == 0:
            mean = float(np.mean(self._recent))
            self.curves.setdefault(stage, []).append((step + 1, round(mean, 4)))
            print(f"{stage} step {step + 1}  loss {mean:.4f}  {self.seconds()} s", flush=True)
            self._recent = []

    def seconds(self) -> int:
        return round(time.time() - self.start)


class OneCycle:
    """AdamW whose learning rate climbs for a tenth of the steps and then falls as a cosine."""

    def __init__(self, parts: Iterable[nn.Module], lr: float, steps: int) -> None:
        self.parameters = [p for part in parts for p in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01)
        warm = max(1, steps // 10)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def batches(n: int, size: int, steps: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """`steps` index arrays of `size` scenes, epoch after epoch in a new order."""
    order = np.array([], int)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(n)])
        yield order[:size]
        order = order[size:]


def train_encoder(
    vision: CLIPVisionModel,
    pixels: Tensor,
    words: Tensor,
    *,
    steps: int,
    rng: np.random.Generator,
    log: Log,
) -> None:
    """Stage 1: the words of a caption, from the mean of the encoder's tokens."""
    head = nn.Linear(vision.config.hidden_size, words.shape[1]).to(pixels.device)
    cycle = OneCycle([vision, head], 1e-3, steps)
    for step, index in enumerate(batches(len(pixels), 64, steps, rng)):
        tokens = vision(pixels[index]).last_hidden_state[:, 1:]
        loss = binary_cross_entropy_with_logits(head(tokens.mean(1)), words[index])
        cycle.step(loss)
        log("encoder", step, loss)


@torch.no_grad()
def encode(vision: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """[n, 100, d_vision]: what the frozen encoder hands to the projector."""
    parts = [
        vision(p, output_hidden_states=True).hidden_states[READ][:, 1:] for p in pixels.split(256)
    ]
    return torch.cat(parts)


def caption_loss(
    model: LlavaForConditionalGeneration, features: Tensor, packed: tq.Packed, prefix: Tensor
) -> Tensor:
    """Mean cross-entropy of the answers' words, all questions of all pictures at once."""
    ids, targets, positions, mask = (t.to(features.device) for t in packed)
    embed = model.get_input_embeddings()
    before = embed(prefix).expand(len(ids), -1, -1)
    image = model.model.multi_modal_projector(features)
    states = model.model.language_model(
        inputs_embeds=torch.cat([before, image, embed(ids)], 1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, -ids.shape[1] :]
    asked = targets >= 0
    return cross_entropy(model.lm_head(states[asked]).float(), targets[asked])


def train_language(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    questions: list[list[tq.Pair]],
    prefix: Tensor,
    *,
    steps: int,
    rng: np.random.Generator,
    log: Log,
) -> None:
    """Stage 2: answer the picture's question and `ROWS` of the rows' in words."""
    projector = model.model.multi_modal_projector
    cycle = OneCycle([projector, model.model.language_model, model.lm_head], 2e-3, steps)
    for step, index in enumerate(batches(len(features), 16, steps, rng)):
        rows = [rng.permutation(GRID)[:ROWS] for _ in index]
        asked = [[questions[i][k] for k in (0, *(1 + r))] for i, r in zip(index, rows)]
        narrow = [[None, *(k if rng.random() < NARROW else None for k in r)] for r in rows]
        loss = caption_loss(model, features[index], tq.pack(asked, narrow), prefix)
        cycle.step(loss)
        log("language", step, loss)


@torch.no_grad()
def held_out_loss(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    questions: list[list[tq.Pair]],
    prefix: Tensor,
) -> float:
    """Caption loss on the scenes kept aside, all their questions: what seeds are compared by."""
    losses = [
        caption_loss(model, features[i : i + 16], tq.pack(questions[i : i + 16]), prefix).item()
        for i in range(0, len(features), 16)
    ]
    return float(np.mean(losses))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--scenes", type=int, default=9_000, help="train scenes to draw")
    parser.add_argument("--encoder-steps", type=int, default=450)
    parser.add_argument("--language-steps", type=int, default=1_500)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    log = Log()

    tokenizer = tq.build_tokenizer()
    model = build_model(tokenizer).to(args.device)
    vision = model.model.vision_tower
    prefix = torch.tensor(tokenizer.encode(tq.PREFIX), device=args.device)

    drawn = scenes("train", args.scenes)
    kept = max(len(drawn) - HELD_OUT, len(drawn) // 2)  # the first are trained on
    print(f"drawing {len(drawn)} scenes", flush=True)
    questions = []
    pixels = torch.empty(len(drawn), 3, SIZE, SIZE)
    words = torch.empty(len(drawn), N_WORDS)
    for i, scene in enumerate(drawn):
        pixels[i] = pixels_of(scene.image)
        words[i] = caption_words(scene.mask)
        questions.append(tq.questions_of(scene, tokenizer))
    pixels, words = pixels.to(args.device), words.to(args.device)

    train_encoder(vision, pixels[:kept], words[:kept], steps=args.encoder_steps, rng=rng, log=log)
    # Frozen for good, so its output is computed once and not once a step.
    features = encode(vision, pixels)
    train_language(
        model,
        features[:kept],
        questions[:kept],
        prefix,
        steps=args.language_steps,
        rng=rng,
        log=log,
    )
    held_out = held_out_loss(model, features[kept:], questions[kept:], prefix)
    print(f"caption loss on {len(drawn) - kept} held-out train scenes: {held_out:.4f}")

    save(model.to("cpu"), tokenizer, args.out)
    record = {
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "held_out_caption_loss": round(held_out, 5),
        "losses": log.curves,
        "scenes": drawn.fingerprint(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": log.seconds(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
