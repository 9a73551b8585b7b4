"""The training script: its language, its packing, and one small run through every stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from interp.datasets.scenes import CLASSES, scenes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import tiny_questions as tq  # noqa: E402
import train_tiny  # noqa: E402

SCENE = scenes("train")[0]


@pytest.fixture(scope="module")
def tokenizer():
    return tq.build_tokenizer()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that the script wrote after a few steps of each stage."""
    out = tmp_path_factory.mktemp("tiny")
    sizes = ["--scenes", "48", "--encoder-steps", "2", "--language-steps", "3"]
    command = [sys.executable, str(ROOT / "experiments/train_tiny.py"), "--out", str(out), *sizes]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return out


def chat(processor, image, question: str):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_words(tokenizer):
    ids = tokenizer("What IS in the picture? zebra").input_ids
    tokens = ["what", "is", "in", "the", "picture", "?", "<unk>"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer(" ".join(CLASSES)).input_ids.count(tokenizer.unk_token_id) == 0


def test_captions_say_what_is_there(tokenizer):
    question, answer = tq.picture_caption(SCENE)
    present = [CLASSES[k] for k in np.unique(SCENE.mask)]
    area = {name: (SCENE.mask == CLASSES.index(name)).sum() for name in present}
    assert question == "what is in the picture ?"
    assert answer.split() == sorted(present, key=lambda name: -area[name])
    cells = np.array([[0, 0, 3, 3, 3, 1, 1, 1, 1, 0]])
    assert tq.row_caption(cells, 0) == ("what is in row 1 ?", "sea 2 orchard 3 lake 4 sea 1")
    assert len(tq.questions_of(SCENE, tokenizer)) == 11


def test_a_packed_question_is_answered_as_if_asked_alone(tokenizer):
    """Packing saves time and changes no number: same positions, nothing seen of its neighbours."""
    torch.manual_seed(0)
    model = train_tiny.build_model(tokenizer).eval()
    prefix = torch.tensor(tokenizer(tq.PREFIX).input_ids)
    features = torch.randn(2, 100, model.config.vision_config.hidden_size)
    both = [tq.questions_of(scene, tokenizer)[:4] for scene in scenes("train", n=2)]
    with torch.no_grad():
        together = train_tiny.caption_loss(model, features, tq.pack(both), prefix)
        total = words = 0.0
        for f, questions in zip(features, both):
            for question in questions:
                alone = tq.pack([[question]])
                n = len(question[1])
                total += n * train_tiny.caption_loss(model, f[None], alone, prefix).item()
                words += n
    assert together.item() == pytest.approx(total / words, abs=1e-5)


def test_targets_are_answers_only(tokenizer):
    questions = tq.questions_of(SCENE, tokenizer)[:3]
    ids, targets, positions, _ = tq.pack([questions])
    asked = targets[0][targets[0] >= 0].tolist()
    assert asked == [word for _, answer in questions for word in answer]
    # Every question starts anew right behind the image.
    starts = np.cumsum([0] + [len(q) + len(a) for q, a in questions])[:-1]
    assert positions[0, 105 + starts].tolist() == [105] * 3
    assert ids.shape == targets.shape


def test_a_narrow_question_looks_at_its_row_alone(tokenizer):
    questions = tq.questions_of(SCENE, tokenizer)[:3]
    mask = tq.pack([questions], narrow=[[None, 0, None]])[3][0, 0]
    wide = tq.pack([questions])[3][0, 0]
    lengths = [len(q) + len(a) for q, a in questions]
    narrow = torch.arange(105 + lengths[0], 105 + lengths[0] + lengths[1])
    changed = (mask != wide).nonzero()
    assert changed[:, 0].unique().tolist() == narrow.tolist()
    # Row 0 is image tokens 0 .. 9, at positions 5 .. 14; the other ninety are hidden.
    assert changed[:, 1].unique().tolist() == list(range(15, 105))
    assert not mask[changed[:, 0], changed[:, 1]].any()


def test_the_run_writes_a_model_that_plain_transformers_loads(trained):
    model = AutoModelForImageTextToText.from_pretrained(trained)
    processor = AutoProcessor.from_pretrained(trained)
    assert model.config.architectures == ["LlavaForConditionalGeneration"]
    x = chat(processor, SCENE.image, "What is in the picture?")
    at = (x["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    assert at.tolist() == list(range(5, 105))
    answer = model.generate(**x)
    assert answer.shape[1] > x["input_ids"].shape[1]


def test_the_processor_makes_the_pixels_that_the_script_trains_on(trained):
    processor = AutoProcessor.from_pretrained(trained)
    x = chat(processor, SCENE.image, "What is in row 3?")
    torch.testing.assert_close(x["pixel_values"][0], train_tiny.pixels_of(SCENE.image))


def test_the_prompt_is_the_one_trained_on(trained, tokenizer):
    processor = AutoProcessor.from_pretrained(trained)
    x = chat(processor, SCENE.image, "What is in row 3?")
    question, _ = tq.questions_of(SCENE, tokenizer)[3]
    image = [tokenizer.image_token_id] * 100
    assert x["input_ids"][0].tolist() == tokenizer(tq.PREFIX).input_ids + image + question


def test_the_log_says_what_was_done(trained):
    log = json.loads((trained / "training.json").read_text())
    assert log["arguments"]["seed"] == 0
    assert log["arguments"]["language_steps"] == 3
    assert log["held_out_caption_loss"] > 0
    assert log["scenes"] == scenes("train", 48).fingerprint()
