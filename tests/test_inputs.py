"""From pictures and questions to inputs: what the processor gives, and what is refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from interp.errors import ImageError
from interp.families import family_of
from interp.inputs import from_tensors, prepare
from tests.zoo import ZOO, build
from tests.zoo import picture as noise

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


@pytest.mark.parametrize("n", [1, 3])
def test_placeholders_that_are_not_one_a_picture_are_refused(tiny, pixels, n):
    with pytest.raises(ValueError, match=rf"2 image placeholders '<image>' for {n} pict.*or none"):
        tiny.prepare([[pixels] * n], "<image> <image> sea")


def test_several_pictures_of_a_row_go_through_the_chat_template(tiny, pixels):
    x = tiny.prepare([[pixels, pixels[:, ::-1]], pixels[:30]], QUESTION)
    assert [prompt.count("<image>") for prompt in x.prompts] == [2, 1]
    grid = x.grid
    assert grid.row[[grid.of_image(i)[0] for i in range(3)]].tolist() == [0, 0, 1]
    assert grid.sizes == ((90, 60), (90, 60), (90, 30))
    assert np.array_equal(grid.is_image, x.tensors["input_ids"] == tiny.config.image_token_id)
    written = tiny.prepare([[pixels, pixels[:, ::-1]], [pixels[:30]]], list(x.prompts))
    assert torch.equal(written.tensors["input_ids"], x.tensors["input_ids"])


def test_row_without_a_picture_is_refused(tiny, pixels):
    with pytest.raises(ImageError, match="row 1 has no picture"):
        tiny.prepare([[pixels], []], QUESTION)


def test_setting_for_one_call_is_checked_and_forgotten(tiny, pixels):
    usual = tiny.prepare(pixels, QUESTION)
    whole = tiny.prepare(pixels, QUESTION, size={"height": 80, "width": 80})
    assert whole.grid.box[[0, -1]].tolist() == [[0, 0, 9, 6], [81, 54, 90, 60]]
    assert not torch.equal(whole.tensors["pixel_values"], usual.tensors["pixel_values"])
    again = tiny.prepare(pixels, QUESTION)
    assert torch.equal(again.tensors["pixel_values"], usual.tensors["pixel_values"])
    with pytest.raises(ValueError, match=r"has no setting do_crop; it has .*do_center_crop"):
        tiny.prepare(pixels, QUESTION, do_crop=False)


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


# -- every family ----------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}user : {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "PLACE {% else %}{{ c['text'] }}{% endif %}{% endfor %} assistant :{% endfor %}"
)
ROWS = [[noise(48, 48), noise(40, 40, seed=1)], [noise(64, 64, seed=2)]]
TEXTS = ["what is in the picture ?", "what ?"]
IDEFICS = ("idefics3", "smolvlm")
SIZES = [(48, 48), (40, 40), (64, 64)]


@cache
def case(name):
    """Family, configuration and processor (with a chat template) of a case of the zoo."""
    module, processor = build(name)
    processor.chat_template = TEMPLATE.replace("PLACE", processor.image_token)
    return family_of(module), module.config, processor


def same(first, second) -> bool:
    """Whether two grids say the same."""
    arrays = all(
        np.array_equal(getattr(first, field), getattr(second, field))
        for field in ("row", "position", "image", "view", "cell", "box", "fillers")
    )
    named = ("shapes", "sizes", "view_names", "view_image", "n_batch", "n_pos")
    return arrays and all(getattr(first, f) == getattr(second, f) for f in named)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ZOO)
def test_batches_of_several_pictures_keep_rows_apart_and_pad_on_the_tokenizers_side(name, side):
    family, config, processor = case(name)
    processor.tokenizer.padding_side = side
    x = prepare(family, config, processor, ROWS, TEXTS)
    assert x.grid.sizes == tuple(SIZES)
    assert [set(x.grid.row[x.grid.of_image(i)]) for i in range(3)] == [{0}, {0}, {1}]
    if name == "internvl":
        side = "left"  # its processor insists
    first, last = (0, -1) if side == "left" else (-1, 0)
    assert not x.tensors["attention_mask"][:, first].all()
    assert x.tensors["attention_mask"][:, last].all()
    assert not (x.is_text & (x.tensors["attention_mask"].numpy() == 0)).any()
    assert x.tensors.keys() >= set(family.needs)
    # a row is what it is alone
    for row, pictures in enumerate(ROWS):
        alone = prepare(family, config, processor, [pictures], TEXTS[row])
        kept = x.tensors["attention_mask"][row].bool()
        assert torch.equal(x.tensors["input_ids"][row][kept], alone.tensors["input_ids"][0])
        assert np.array_equal(x.grid.is_image[row][kept], alone.grid.is_image[0])


@pytest.mark.parametrize("name", ZOO)
def test_ready_made_tensors_give_the_same_inputs(name):
    family, config, processor = case(name)
    x = prepare(family, config, processor, ROWS, TEXTS)
    tensors = dict(reversed(x.tensors.items()))
    made = from_tensors(family, config, tensors, sizes=SIZES, processor=processor)
    assert list(made.tensors) == list(x.tensors)
    for grids in ((x.grid, made.grid), (x.patches, made.patches), (x.adapter, made.adapter)):
        assert same(*grids)
    # and with what only a processor knows told by hand (squares: nothing is cropped)
    tiles = {
        "idefics3": [(3, 3)] * 3,
        "smolvlm": [(3, 3)] * 3,
        "internvl": [(2, 2), (1, 1), (2, 2)],
    }
    byhand = from_tensors(family, config, tensors, sizes=SIZES, tiles=tiles.get(name))
    for grids in ((x.grid, byhand.grid), (x.patches, byhand.patches), (x.adapter, byhand.adapter)):
        assert same(*grids)


@pytest.mark.parametrize("name", ZOO)
def test_sizes_default_to_what_the_tensors_say(name):
    family, config, processor = case(name)
    x = prepare(family, config, processor, noise(48, 48), "what ?")
    split = {"internvl": [(2, 2)]} | {key: [(3, 3)] for key in IDEFICS}
    made = from_tensors(family, config, x.tensors, tiles=split.get(name))
    expected = {
        "llava-next": (48, 48),  # told by image_sizes
        "llava-onevision": (48, 48),
        "qwen2-vl": (48, 48),  # a multiple of 16, so nothing is resized
        "qwen2.5-vl": (48, 48),
        "qwen3-vl": (48, 48),
        "internvl": (64, 64),
        "idefics3": (96, 96),
        "smolvlm": (96, 96),
    }
    assert made.grid.sizes == (expected.get(name, (32, 32)),)
    box = made.grid.select("finest").box
    assert box[0, :2].tolist() == [0, 0]
    assert box[-1, 2:].tolist() == list(made.grid.sizes[0])


def test_without_the_originals_size_the_processors_crop_is_not_undone(monkeypatch):
    family, config, processor = case("llava-clip-llama")
    monkeypatch.setattr(processor.image_processor, "size", {"shortest_edge": 40})
    x = prepare(family, config, processor, noise(90, 40), "what ?")
    assert x.grid.box[[0, -1]].tolist() == [[29, 4, 37, 12], [53, 28, 61, 36]]
    made = from_tensors(family, config, x.tensors, processor=processor)
    assert made.grid.box[[0, -1]].tolist() == [[0, 0, 8, 8], [24, 24, 32, 32]]


def test_squares_are_taken_for_pictures_only_where_that_is_certain():
    family, config, processor = case("gemma3")
    alone = prepare(family, config, processor, [noise(), noise(50, 40)], "what ?")
    assert from_tensors(family, config, alone.tensors).grid.sizes == ((32, 32),) * 2
    two = prepare(family, config, processor, [[noise(), noise(50, 40)]], "what ?")
    with pytest.raises(ValueError, match="2 squares of pixels for an unknown number"):
        from_tensors(family, config, two.tensors)  # they may be crops
    made = from_tensors(family, config, two.tensors, processor=processor)
    assert made.grid.sizes == ((32, 32),) * 2
    told = from_tensors(family, config, two.tensors, sizes=[(40, 32), (50, 40)])
    assert same(told.grid, two.grid)


def test_pan_and_scan_crops_may_be_told():
    family, config, processor = case("gemma3")
    scan = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}
    x = prepare(family, config, processor, noise(90, 31), "what ?", **scan)
    assert x.grid.shapes == ((2, 2), (2, 6))
    made = from_tensors(family, config, x.tensors, sizes=[(90, 31)], tiles=[(1, 3)])
    assert same(made.grid, x.grid)


def test_what_is_certain_is_filled_in_and_what_is_not_is_asked_for():
    family, config, processor = case("qwen2-vl")
    x = prepare(family, config, processor, ROWS[:1], TEXTS[0])
    left = {k: v for k, v in x.tensors.items() if k in ("input_ids", "pixel_values")}
    made = from_tensors(family, config, {**left, "image_grid_thw": x.tensors["image_grid_thw"]})
    for name in ("attention_mask", "mm_token_type_ids"):
        assert torch.equal(made.tensors[name], x.tensors[name])
    ids = left["input_ids"].clone()
    ids[0, -1] = config.video_token_id
    with pytest.raises(ValueError, match="else without mm_token_type_ids; given: input_ids"):
        from_tensors(
            family,
            config,
            {
                "input_ids": ids,
                **{k: x.tensors[k] for k in ("pixel_values", "image_grid_thw")},
            },
        )
    with pytest.raises(ValueError, match=r"Qwen2-VL model .*without image_grid_thw; given: input_"):
        from_tensors(family, config, left, sizes=SIZES[:2])
    for name in ("gemma3", "paligemma"):
        family, config, processor = case(name)
        tensors = dict(prepare(family, config, processor, noise(), "what ?").tensors)
        del tensors["token_type_ids"]
        with pytest.raises(
            ValueError, match=r"token_type_ids \(Gemma3: 1 on image tokens, else 0;"
        ):
            from_tensors(family, config, tensors)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llava-clip-llama", {"labels": None}, r"labels: no input\(s\) of a LLaVA model here"),
        ("llava-clip-llama", {"input_ids": ...}, "no input_ids among attention_mask, pixel_values"),
        ("internvl", {}, r"5 squares of pixels for an unknown .*tiles=\[\(rows, columns\)"),
        ("idefics3", {}, r"10 squares of pixels for an unknown number of picture.*tiles"),
        ("gemma3", {"sizes": SIZES[:2]}, r"1 squares of pixels for 2 picture\(s\)"),
        ("internvl", {"sizes": SIZES[:1]}, r"5 squares of pixels for 1 picture\(s\): the tensors"),
        ("llava-clip-llama", {"sizes": SIZES}, "has 1 rows where these pictures give 3, one pict"),
        ("internvl", {"sizes": SIZES, "tiles": [(2, 2)]}, "tiles of 1 pictures, but sizes of 3"),
        ("internvl", {"tiles": [(1, 3)]}, "pixel_values has 5 rows where these pictures give 4"),
        ("idefics3", {"tiles": [(2, 3)]}, "has 10 tiles that are not all zero .* give 7"),
        ("qwen2-vl", {"sizes": SIZES}, "image_grid_thw is of 1 pictures, not of 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, change, says):
    family, config, processor = case(name)
    tensors = dict(prepare(family, config, processor, noise(48, 48), "what ?").tensors)
    options = {k: v for k, v in change.items() if k in ("sizes", "tiles")}
    tensors |= {k: v for k, v in change.items() if k not in options}
    tensors = {k: v for k, v in tensors.items() if v is not ...}
    with pytest.raises(ValueError, match=says):
        from_tensors(family, config, tensors, **options)


def test_processor_and_tiles_may_not_both_tell():
    family, config, processor = case("internvl")
    tensors = prepare(family, config, processor, noise(48, 48), "what ?").tensors
    with pytest.raises(ValueError, match="give it or tiles, not both"):
        from_tensors(family, config, tensors, tiles=[(2, 2)], processor=processor)
