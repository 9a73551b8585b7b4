"""From pictures and questions to inputs: what the processor gives, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from interp.errors import ImageError

QUESTION = "what is in the picture ?"


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def test_inputs_are_the_processors_own(tiny, pixels):
    picture = Image.fromarray(pixels)
    x = tiny.prepare(picture, QUESTION)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = tiny.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    expected = tiny.processor(images=[picture], text=[prompt], return_tensors="pt")
    assert x.prompts == (prompt,)
    assert x.tensors.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(x.tensors[name], expected[name]) for name in x.tensors)
    assert repr(x).startswith("Inputs(input_ids [1, ")
    assert (len(x), x.n_pos) == tuple(expected["input_ids"].shape)


def test_image_tokens_are_where_the_placeholders_are(tiny, pixels):
    x = tiny.prepare(Image.fromarray(pixels), QUESTION)
    ids = x.tensors["input_ids"].numpy()
    assert np.array_equal(x.grid.is_image, ids == tiny.config.image_token_id)
    assert np.array_equal(x.is_text, ~x.grid.is_image)
    # 90 x 60 is enlarged to 120 x 80 and cropped to its middle
    assert x.grid.box[[0, -1]].tolist() == [[15, 0, 21, 6], [69, 54, 75, 60]]


def test_labels_of_a_batch_of_odd_sizes_are_what_the_model_is_shown(tiny):
    """A white ellipse on black: a token labelled white is one whose patch is mostly white, in
    pictures of any size and shape, after the processor's own resizing and cropping."""
    masks = []
    for width, height in [(90, 61), (47, 133), (333, 200)]:
        y, x = np.mgrid[:height, :width]
        inside = ((x / width - 0.45) / 0.3) ** 2 + ((y / height - 0.55) / 0.4) ** 2 < 1
        masks.append(inside.astype(int))
    pictures = [np.repeat(255 * m[..., None], 3, axis=2).astype(np.uint8) for m in masks]
    shown = tiny.prepare(pictures, QUESTION)
    patches = shown.tensors["pixel_values"].mean(1).reshape(3, 10, 8, 10, 8).mean((2, 4))
    whiteness = patches.numpy().ravel() / 2 + 0.5  # the processor maps 0..255 to -1..1
    labels = shown.grid.labels(masks, 2)
    clear = abs(whiteness - 0.5) > 0.1  # resizing blurs borders by about a pixel of eight
    assert clear.mean() > 0.85
    assert np.array_equal(labels[clear], whiteness[clear] > 0.5)
    assert np.abs(shown.grid.fractions(masks, 2)[:, 1] - whiteness).max() < 0.2


def test_picture_may_be_an_array_a_path_or_another_mode(tiny, pixels, tmp_path):
    expected = tiny.prepare(Image.fromarray(pixels), QUESTION).tensors["pixel_values"]
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    for same in (pixels, tmp_path / "picture.png", str(tmp_path / "picture.png"), pixels[None]):
        assert torch.equal(tiny.prepare(same, QUESTION).tensors["pixel_values"], expected)
    see_through = Image.fromarray(pixels).convert("RGBA")
    assert torch.equal(tiny.prepare(see_through, QUESTION).tensors["pixel_values"], expected)
    gray = Image.fromarray(pixels).convert("L")
    assert tiny.prepare(gray, QUESTION).tensors["pixel_values"].shape == (1, 3, 80, 80)


def test_batch_is_padded_on_the_left_and_gives_each_row_its_own_run(tiny, pixels):
    pictures = [Image.fromarray(pixels), Image.fromarray(pixels[:, ::-1].copy())]
    both = tiny.prepare(pictures, [QUESTION, "what is in row 1 ? " + QUESTION])
    assert both.tensors["attention_mask"][:, 0].tolist() == [0, 1]
    assert both.grid.sizes == ((90, 60), (90, 60))
    logits = tiny.run(both).logits
    for row, (picture, text) in enumerate(
        zip(pictures, [QUESTION, "what is in row 1 ? " + QUESTION])
    ):
        alone = tiny.prepare(picture, text)
        # another position offset and another kernel shape: float32 rounding, logits of size 10
        assert torch.allclose(logits[row, -alone.n_pos :], tiny.run(alone).logits[0], atol=1e-3)


def test_states_of_image_tokens_do_not_depend_on_the_question(tiny, pixels):
    name = "blocks.2.hook_resid_post"
    first, second = (
        tiny.run(tiny.prepare(pixels, text), read=name).tokens(name) for text in (QUESTION, "lake")
    )
    assert torch.allclose(first, second, atol=1e-5)


def test_text_with_a_placeholder_is_the_whole_prompt(tiny, pixels):
    x = tiny.prepare(pixels, "<image> sea")
    assert x.prompts == ("<image> sea",)
    assert x.grid.position.tolist() == list(range(100))


def test_processor_without_a_chat_template_gets_the_placeholder_in_front(tiny, pixels, monkeypatch):
    monkeypatch.setattr(tiny.processor, "chat_template", None)
    assert tiny.prepare(pixels, "sea").prompts == ("<image>\nsea",)


def test_two_placeholders_for_one_picture_are_refused(tiny, pixels):
    with pytest.raises(ValueError, match=r"placeholder|images"):
        tiny.prepare(pixels, "<image> <image> sea")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (
            None,
            r"NoneType is no picture; a PIL image, a uint8 array \[height, width, 3\] or a path",
        ),
        (torch.zeros(3, 80, 80), "Tensor is no picture.*tensors are the processor's output"),
        (torch.zeros(()), "Tensor is no picture"),
        (np.zeros((8, 8, 3)), r"an array of float64 \[8, 8, 3\] is no picture; uint8"),
        (np.zeros((8, 8), np.uint8), r"an array of uint8 \[8, 8\] is no picture"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \[8, 8, 4\] is no picture"),
        (np.zeros((2, 8, 8, 3)), r"float64 \[8, 8, 3\]"),
        ("nowhere.png", "no picture at 'nowhere.png'"),
        ([3], "int is no picture"),
    ],
)
def test_image_of_the_wrong_kind_is_refused(tiny, image, says):
    with pytest.raises(ImageError, match=says):
        tiny.prepare(image, QUESTION)


def test_file_that_is_no_picture_is_refused(tiny, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(ImageError, match=r"notes\.png' is no picture that Pillow can read"):
        tiny.prepare(path, QUESTION)


@pytest.mark.parametrize(
    ("n_pictures", "texts", "says"),
    [
        (2, ["a"], "2 pictures and 1 texts; give one text for all pictures, or one for each"),
        (1, ["a", "b"], "1 pictures and 2 texts"),
        (0, "a", "0 pictures"),
    ],
)
def test_wrong_number_of_texts_is_refused(tiny, picture, n_pictures, texts, says):
    with pytest.raises(ValueError, match=says):
        tiny.prepare([picture] * n_pictures, texts)
