"""Where each image token comes from, measured on the model, against what the layouts say.

With all attention of the vision tower switched off, a patch sees its own pixels only, and so does
each image token. So differentiating says which pixels are a token's. Two derivatives are enough for
all tokens at once: of the sum of the tokens, and of the sum in which token number n counts n times.
Where a pixel is one token's alone, their ratio is that token's number; where it were several
tokens', it would be no whole number.

Where a model's pixel lies in the original picture is measured too: the processor is given a picture
whose red is the column, whose green is the row and whose blue marks it as picture, not padding, and
resizes it to the nearest pixel. Nothing here uses the geometry that is tested.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.utils import is_torchvision_available

from interp.families import family_of, layouts_cuts, layouts_parts
from interp.families.geometry import image_settings
from interp.inputs import prepare
from tests import zoo
from tests.record import proved
from tests.zoo import VISION, ZOO, build, randomise

OFF = ("self_attn.out_proj", "attn.proj", "attention.projection_layer")
LANDSCAPE, PORTRAIT, SQUARE, ODD = (90, 40), (37, 80), (48, 48), (101, 67)


@cache
def blind(name: str):
    """A case of the zoo, silenced."""
    return silence(*build(name))


def silence(module, processor):
    """A float64 model whose vision tower does not attend, its processor on nearest pixels."""
    module = module.double().eval()
    for path, part in module.named_modules():
        if path.endswith(OFF) and "language" not in path and "text_model" not in path:
            for parameter in part.parameters():
                parameter.data.zero_()
    processor.image_processor.resample = 0
    return module, processor, family_of(module)


def chart(size) -> Image.Image:
    """A picture whose every pixel tells its column and row."""
    width, height = size
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([column, row, np.full_like(row, 255)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


class Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


def states(module, family, tensors):
    """What leaves the tower's embedding, its last block and the adapter, and enters the LLM."""
    caught = {}

    def catch(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            caught[name] = output[None] if output.ndim == 2 else output

        return hook

    def enter(module, args, kwargs):
        caught["llm"] = kwargs["inputs_embeds"]
        raise Stop

    language = family.language.blocks.removesuffix(".layers")
    handles = [
        module.get_submodule(family.vision.embed).register_forward_hook(catch("embed")),
        module.get_submodule(f"{family.vision.blocks}.2").register_forward_hook(catch("vision")),
        module.get_submodule(family.adapter).register_forward_hook(catch("adapter")),
        module.get_submodule(language).register_forward_pre_hook(enter, with_kwargs=True),
    ]
    try:
        with pytest.raises(Stop):
            module(**tensors, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def by_channel(pixels: np.ndarray) -> np.ndarray:
    """`[rows, 3, pixels of a row]` of any family's `pixel_values`."""
    if pixels.ndim == 2:  # packed: [patch, channel x frame x height x width]
        return pixels.reshape(len(pixels), 3, -1)
    return pixels.reshape(-1, 3, pixels.shape[-2] * pixels.shape[-1])


def owners(state: torch.Tensor, pixels: torch.Tensor) -> np.ndarray:
    """Which vector of `[row, position, d]` each model pixel goes into; -1 for none, -2 for several.

    Vectors are numbered row by row.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(state.shape[-1], generator=generator, dtype=state.dtype)
    sums = (state @ vector).flatten()
    number = torch.arange(1, len(sums) + 1, dtype=state.dtype)
    plain, weighted = (
        by_channel(torch.autograd.grad(loss, pixels, retain_graph=True)[0].numpy())
        for loss in (sums.sum(), (sums * number).sum())
    )
    # the channel that tells most: some families compute their norms in float32
    best = np.abs(plain).argmax(1, keepdims=True)
    plain, weighted = (np.take_along_axis(g, best, 1)[:, 0] for g in (plain, weighted))
    touched = np.abs(plain) > 1e-9
    ratio = np.divide(weighted, plain, out=np.zeros_like(plain), where=touched)
    whole = np.abs(ratio - np.rint(ratio)) < 0.01
    return np.where(touched, np.where(whole, np.rint(ratio) - 1, -2), -1).astype(int)


def misplaced(grid, owner, origin, n_pos, tolerance, used) -> list[str]:
    """What is wrong with a grid, given what was measured: nothing, if it is right.

    Args:
        grid: to be checked.
        owner: `[rows, pixels]`, from `owners`.
        origin: `[rows, 3, pixels]`, column, row and 255 of each model pixel, or padding.
        n_pos: positions in a row of the state.
        tolerance: in pixels of each original picture, (x, y): the processor's rounding.
        used: `[rows, pixels]` bool, whether the language model sees a pixel at all. LLaVA-NeXT
            drops the outermost row of patches if hardly any of it is picture.
    """
    wrong = []
    ids = grid.row * n_pos + grid.position
    picture = origin[:, 2] > 254
    stray = np.setdiff1d(owner[picture & used], [*ids, -1])
    if len(stray):
        wrong.append(f"pixels go into {stray[:5]}, which are no tokens of the grid")
    for token, number in enumerate(ids):
        size, slack = grid.sizes[grid.image[token]], tolerance[grid.image[token]]
        mine = (owner == number) & picture
        low, high = (np.clip(grid.box[token][i : i + 2], 0, size) for i in (0, 2))
        if not mine.any():
            if (high - low > slack).all():
                wrong.append(f"token {token} sees no pixel, its box is {grid.box[token]}")
            continue
        for axis in (0, 1):
            at = origin[:, axis][mine] + 0.5
            if at.min() < low[axis] - slack[axis] or at.max() > high[axis] + slack[axis]:
                wrong.append(f"token {token} sees {at.min()}..{at.max()} outside its box")
            # the outermost pixels of the model have their centres half their size inside the box
            edge = slack[axis] + 0.5 * (np.ptp(at) + 1) / max(len(np.unique(at)) - 1, 1)
            if at.min() > low[axis] + edge or at.max() < high[axis] - edge:
                wrong.append(f"token {token} sees only {at.min()}..{at.max()} of its box")
    return wrong


def measure(model, pictures, side="right", **settings):
    """The grids of a batch of charts, and what the model and the processor really do.

    Args:
        model: a case of the zoo, or what `silence` gives.
        pictures: (width, height) of the charts in each row of the batch.
        side: of padding.
        settings: of the image processor.
    """
    module, processor, family = blind(model) if isinstance(model, str) else model
    processor.tokenizer.padding_side = side
    texts = ["what is in the picture ?", "a red dog on green grass . what is it ?"][: len(pictures)]
    charts = [[chart(size) for size in row] for row in pictures]
    x = prepare(family, module.config, processor, charts, texts, **settings)
    tensors = dict(x.tensors)
    origin = by_channel(np.rint(tensors["pixel_values"].numpy() * 255))
    # noise in place of the chart: no pixel is special, and no tile is all zero that was not
    noise = torch.rand(tensors["pixel_values"].shape, dtype=torch.float64) + 0.1
    there = tensors["pixel_values"].flatten(-3).any(-1) if noise.ndim > 2 else None
    if there is not None:
        noise = noise * there[..., None, None, None]
    pixels = noise.requires_grad_(True)
    tensors["pixel_values"] = pixels
    caught = states(module, family, tensors)
    grids = {"llm": x.grid, "adapter": x.adapter, "vision": x.patches}
    found = {stage: owners(caught[stage], pixels) for stage in caught}
    return SimpleNamespace(
        x=x, grids=grids, owner=found, origin=origin, caught=caught, module=module, family=family,
        processor=processor, pixels=pixels,
    )  # fmt: skip


def errors(m, stage, grid=None) -> list[str]:
    """`misplaced` for a stage of a measurement, or for another grid in its place."""
    grid = grid or m.grids[stage]
    # nearest-pixel resizing is off by half a pixel of what it reads; twice or thrice resized
    # pictures (Idefics3) are off by half a pixel of each
    slack = []
    for width, height in m.x.grid.sizes:
        small = max(width, height) / 96 if "Idefics" in m.family.name else 0.0
        slack.append((0.51 + small, 0.51 + small))
    used = m.owner["llm"] != -1
    return misplaced(grid, m.owner[stage], m.origin, m.caught[stage].shape[1], slack, used)


BATCHES = {
    "landscape": ([[LANDSCAPE]], "right"),
    "portrait": ([[PORTRAIT]], "right"),
    "square": ([[SQUARE]], "right"),
    "two in one prompt": ([[ODD, PORTRAIT]], "right"),
    "padded on the right": ([[PORTRAIT], [LANDSCAPE]], "right"),
    "padded on the left": ([[SQUARE, ODD], [PORTRAIT]], "left"),
}


def with_torchvision(name):
    """A case with transformers' other image processor, which it prefers where it can."""
    module, processor = build(name)
    pil = processor.image_processor
    other = getattr(transformers, type(pil).__name__.removesuffix("Pil"))
    options = {k: v for k, v in pil.to_dict().items() if k != "image_processor_type"}
    processor.image_processor = other(**options)
    if hasattr(pil, "image_seq_length"):  # PaliGemma's processor wants it there
        processor.image_processor.image_seq_length = pil.image_seq_length
    return silence(module, processor)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ZOO)
def test_every_token_is_the_piece_of_the_picture_that_its_box_says(name, batch):
    m = measure(name, *BATCHES[batch])
    for stage in m.grids:
        assert errors(m, stage) == [], stage
        assert m.caught[stage].shape[:2] == (m.grids[stage].n_batch, m.grids[stage].n_pos)
    # patches keep their places from the embedding on, but for the tower that reorders them
    # (in pictures that are wider than a window)
    if not m.family.vision.reordered:
        assert errors(m, "embed", m.x.patches) == []
    elif batch == "landscape":
        assert errors(m, "embed", m.x.patches)
    if batch == list(BATCHES)[-1]:
        proved(name, "token to pixel")


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
@pytest.mark.parametrize("name", ZOO)
def test_torchvisions_processors_cut_the_picture_in_the_same_way(name):
    m = measure(with_torchvision(name), [[ODD, PORTRAIT], [LANDSCAPE]], "left")
    assert m.processor.image_processor.backend == "torchvision"
    for stage in m.grids:
        assert errors(m, stage) == [], stage


@pytest.mark.parametrize("name", ZOO)
def test_placeholders_are_tokens_or_fillers_and_fillers_see_nothing(name):
    m = measure(name, [[SQUARE, ODD], [LANDSCAPE]], "left")
    grid, ids = m.x.grid, m.x.tensors["input_ids"].numpy()
    assert np.array_equal(grid.is_placeholder, ids == m.module.config.image_token_id)
    assert grid.is_image.sum() == len(grid) == grid.is_placeholder.sum() - len(grid.fillers)
    assert (len(grid.fillers) > 0) == ("llava-next" in name or "onevision" in name)
    assert not (m.x.is_text & grid.is_placeholder).any()
    entry = m.caught["llm"][grid.fillers[:, 0], grid.fillers[:, 1]]
    (gradient,) = torch.autograd.grad(
        entry.sum() + 0 * m.caught["llm"].sum(), m.pixels, retain_graph=True
    )
    assert not gradient.any()


# -- less common settings --------------------------------------------------------------------------


def llava_full():
    """LLaVA that feeds CLS on."""
    module, processor = build("llava-clip-llama")
    module.config.vision_feature_select_strategy = "full"
    processor.vision_feature_select_strategy = "full"
    return silence(module, processor)


def llava_padded():
    """LLaVA whose processor pads pictures to a square first, as LLaVA-1.5's own code did."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    module, processor = build("llava-clip-llama")
    processor.image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        **zoo.STILL,
    )
    return silence(module, processor)


def rest(name, side=36):
    """A case whose patches of 8 pixels do not fill its pictures or tiles of 36."""
    old = dict(VISION)
    VISION["image_size"] = [side, side] if name == "internvl" else side
    try:
        torch.manual_seed(0)
        module, processor = ZOO[name].build()
    finally:
        VISION.update(old)
    randomise(module)
    images = processor.image_processor
    for attribute in ("size", "crop_size"):
        if getattr(images, attribute, None) is not None:
            was = dict(getattr(images, attribute))
            setattr(images, attribute, {key: v * side // 32 for key, v in was.items() if v})
    if hasattr(images, "image_grid_pinpoints"):
        points = [[side * a // 32, side * b // 32] for a, b in images.image_grid_pinpoints]
        images.image_grid_pinpoints = module.config.image_grid_pinpoints = points
    return silence(module, processor)


SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 20,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
SETTINGS = {
    "CLS is fed on": (llava_full, {}),
    "padded to a square": (llava_padded, {}),
    "patches that do not fill the picture": (partial(rest, "llava-siglip-mistral"), {}),
    "patches that do not fill the tiles": (partial(rest, "llava-onevision"), {}),
    "patches that do not fill the tiles, CLS": (partial(rest, "llava-next"), {}),
    "pan and scan": (partial(blind, "gemma3"), SCAN),
    "one tile": (partial(blind, "internvl"), {"crop_to_patches": False}),
    "many tiles": (partial(blind, "internvl"), {"max_patches": 6}),
    "not split": (partial(blind, "idefics3"), {"do_image_splitting": False}),
    "small enough for one tile": (partial(blind, "smolvlm"), {"size": {"longest_edge": 32}}),
    "resized to fewer tiles": (partial(blind, "smolvlm"), {"size": {"longest_edge": 64}}),
    "larger pictures": (
        partial(blind, "qwen2.5-vl"),
        {"size": {"shortest_edge": 64 * 64, "longest_edge": 144 * 144}},
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_of_the_processor_is_undone(setting):
    make, settings = SETTINGS[setting]
    m = measure(make(), [[LANDSCAPE, ODD], [PORTRAIT]], **settings)
    for stage in m.grids:
        assert errors(m, stage) == [], stage
    names = m.x.grid.view_names
    if setting == "pan and scan":
        assert names == ("base", "tiles", "base", "tiles", "base", "tiles")
        assert m.x.grid.shapes[1::2] == ((2, 4), (2, 4), (4, 2))
    if setting in ("one tile", "not split", "small enough for one tile"):
        assert names == ("base",) * 3
    assert (setting == "CLS is fed on") == (len(m.x.grid.fillers) == 3)


@pytest.mark.parametrize(
    ("size", "n"), [((200, 40), 4), ((58, 200), 3), ((60, 46), 2), ((48, 41), 0), ((38, 30), 0)]
)
def test_pan_and_scan_takes_as_many_crops_as_the_processor(size, n):
    m = measure("gemma3", [[size]], **SCAN)
    assert len(m.caught["adapter"]) == 1 + n
    assert len(m.x.grid) == 4 * (1 + n)
    assert not errors(m, "llm")


SOME_SIZES = np.random.default_rng(0).integers(20, 200, (150, 2)).tolist()


@pytest.mark.parametrize("longest", [50, 64, 70, 96, 150])
def test_idefics_pictures_are_split_as_the_processor_splits_them(longest):
    _, processor, _ = blind("idefics3")
    images = processor.image_processor
    settings = image_settings(processor)
    settings.size = {"longest_edge": longest}
    for width, height in SOME_SIZES:
        made = images(
            Image.new("RGB", (width, height), "white"),
            size={"longest_edge": longest},
            return_row_col_info=True,
        )
        expected = made["rows"][0][0], made["cols"][0][0]
        assert layouts_cuts.split(settings, (width, height)) == expected, (width, height)


@pytest.mark.parametrize("size", [{"height": 64, "width": 64}, {"longest_edge": 5000}])
def test_way_of_resizing_that_is_not_known_is_refused(size):
    _, processor, _ = blind("idefics3")
    settings = image_settings(processor)
    settings.size = size
    with pytest.raises(
        NotImplementedError, match=r"Idefics3\w+ resizes by .*longest_edge of up to"
    ):
        layouts_cuts.split(settings, (40, 30))


def test_internvl_pictures_are_cut_into_as_many_tiles_as_the_processor_makes():
    _, processor, _ = blind("internvl")
    settings = image_settings(processor)
    for width, height in SOME_SIZES:
        made = processor.image_processor(
            Image.new("RGB", (width, height)), crop_to_patches=True, return_tensors="np"
        )
        rows, cols = layouts_cuts.closest_canvas(settings, (32, 32), (width, height))
        assert len(made["pixel_values"]) == rows * cols + (rows * cols > 1)


def test_resampled_tokens_are_where_their_boxes_are():
    """OneVision mixes the patches of a large picture: each token is of the two patches nearest to
    its box's centre along each axis, so what it sees has that centre, to half a patch."""
    m = measure("llava-onevision", [[(120, 90)]])
    grid, patches = m.x.grid.select("tiles"), m.x.patches.select("tiles")
    assert (patches.shapes, grid.shapes) == (((12, 16),), ((6, 9),))  # 3 x 4 tiles, at most 4
    for stage in ("adapter", "vision"):
        assert errors(m, stage) == []
    side = patches.box[0, 2:] - patches.box[0, :2]
    centres = m.x.grid.select("tiles").box.reshape(-1, 2, 2).mean(1)
    far = []
    for token, centre in enumerate(centres):
        entry = m.caught["llm"][grid.row[token], grid.position[token]].sum()
        (gradient,) = torch.autograd.grad(entry, m.pixels, retain_graph=True)
        seen = (np.abs(by_channel(gradient.numpy())).sum(1) > 0) & (m.origin[:, 2] > 254)
        at = np.array([m.origin[:, axis][seen] + 0.5 for axis in (0, 1)])
        far.append(np.abs((at.min(1) + at.max(1)) / 2 - centre) / side)
        assert (np.ptp(at, axis=1) < 2.2 * side).all()
    assert np.max(far) < 0.6


# -- wrong layouts are found out -------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_two_tokens_swapped_or_a_grid_moved_by_half_a_cell_are_found_out(name):
    m = measure(name, [[LANDSCAPE], [PORTRAIT]])
    for stage, grid in m.grids.items():
        swapped = np.arange(len(grid))
        swapped[[0, 1]] = 1, 0
        found = errors(m, stage, replace(grid, box=grid.box[swapped]))
        assert {message.split()[1] for message in found} == {"0", "1"}
        half = (grid.box[:, 2:] - grid.box[:, :2]) / 2
        for axis in (0, 1):
            moved = grid.box.copy()
            moved[:, [axis, axis + 2]] += half[:, [axis]]
            assert errors(m, stage, replace(grid, box=moved))


@pytest.mark.parametrize("name", ZOO)
def test_rows_taken_for_columns_are_found_out(name):
    m = measure(name, [[LANDSCAPE]])
    for stage, grid in m.grids.items():
        box = grid.box.copy()
        for view, shape in enumerate(grid.shapes):
            at = grid.of_view(view)
            box[at] = box[at].reshape(*shape, 4).swapaxes(0, 1).reshape(-1, 4)
        assert errors(m, stage, replace(grid, box=box))


def test_windows_ignored_are_found_out(monkeypatch):
    module, *_ = blind("qwen2.5-vl")
    monkeypatch.delattr(module.config.vision_config, "window_size")  # the tower has its own copy
    m = measure("qwen2.5-vl", [[ODD]])
    assert not errors(m, "llm")  # the order is undone in front of it
    assert errors(m, "adapter")
    assert errors(m, "vision")


def test_tiles_taken_for_one_raster_are_found_out(monkeypatch):
    def one_raster(x, y, tiles, row, n_rows, prefix):
        lattice = tiled(x, y, tiles, row, n_rows, prefix)
        order = np.lexsort(lattice.at.T[::-1])
        return replace(lattice, at=lattice.at[order])

    tiled = layouts_parts.tiled_lattice
    monkeypatch.setattr(layouts_parts, "tiled_lattice", one_raster)
    for name in ("internvl", "idefics3"):
        assert errors(measure(name, [[ODD]]), "llm")


def test_merge_order_ignored_is_found_out():
    for name in ("qwen2-vl", "qwen3-vl"):
        m = measure(name, [[ODD]])
        raster = replace(m.x.patches, position=np.arange(len(m.x.patches)))
        assert not errors(m, "vision")
        assert errors(m, "vision", raster)
