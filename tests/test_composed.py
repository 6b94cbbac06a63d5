"""Models put together from an image tower of timm's and a BERT: equal to their parts, and wrong parts are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining, BertModel

from modelscope_cnclip import checkpoint
from modelscope_cnclip.towers import CLIP_MEAN, CLIP_STD, ChineseCLIP, resize_position_embedding
from modelscope_cnclip.trainers import composed
from modelscope_cnclip.trainers.composed import compose
from modelscope_cnclip.trainers.recipe import RecipeError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"猫狗鱼一只条", "cat", "##s"]
SHAPE = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
CLIP = "vit_base_patch16_clip_quickgelu_224"
TEXT = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])


@pytest.fixture(autouse=True)
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's base ViT with fewer numbers."""
    monkeypatch.setattr(composed, "_CLIP_SHAPES", {"base": (64, 2, 64)})


def write_bert(folder: Path, model: nn.Module, vocab: bool = True) -> Path:
    model.save_pretrained(folder)
    if vocab:
        (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return folder


def some_bert(kind: type = BertModel, seed: int = 3, **shape: Any) -> nn.Module:
    torch.manual_seed(seed)
    return kind(BertConfig(**{**SHAPE, **shape})).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), some_bert())


def clip_vit(resolution: int = 64, classes: int = 512, seed: int = 4) -> VisionTransformer:
    """What timm makes of CLIP's name, at the small size."""
    torch.manual_seed(seed)
    tower = VisionTransformer(
        img_size=resolution, patch_size=16, embed_dim=64, depth=2, num_heads=1, pre_norm=True, norm_layer=nn.LayerNorm,
        act_layer="quick_gelu", num_classes=classes,
    )  # fmt: skip
    return randomised(tower)


def randomised(tower: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += torch.randn_like(parameter) * 0.02
        for name, buffer in tower.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += torch.rand_like(buffer)
    return tower.eval()


def save(state: dict[str, Tensor], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        torch.save(state, file)
    return file


def build(name: str, bert: Path, weights: Path | None = None, seed: int = 42, **keys: Any) -> ChineseCLIP:
    vision = {"timm": name, "resolution": 64, "weights": None if weights is None else str(weights)}
    vision |= keys.pop("vision", {})
    return compose({"vision": vision, "text": {"bert": str(bert)}, **keys}, seed, "a.json").build()


def refused(spec: dict[str, Any], *says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose(spec, where="a.json: pretrained_model")
    text = str(caught.value)
    assert text.startswith("a.json: pretrained_model")
    assert "\n" not in text
    for part in says:
        assert part in text


def pixels(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- equal to the parts


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_vit2", "test_convnext", "test_resnet"])
def test_another_backbone(name: str, suffix: str, bert: Path, tmp_path: Path) -> None:
    """Its classifier stays out; the new projection is linear."""
    torch.manual_seed(1)
    size = {"img_size": 64} if "vit" in name else {}
    theirs = randomised(timm.create_model(name, num_classes=7, **size))
    weights = save(theirs.state_dict(), tmp_path / f"a{suffix}")
    model = build(name, bert, weights, embed_dim=24)
    theirs.reset_classifier(0)
    with torch.no_grad():
        features = theirs(pixels())
        torch.testing.assert_close(model.image_trunk(pixels()), features, rtol=0, atol=0)
        torch.testing.assert_close(model.encode_image(pixels()), features @ model.visual.proj.weight.T)
    assert model.encode_image(pixels()).shape == (2, 24)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": {f"module.{k}": v for k, v in x.items()}}])
def test_clips_own_tower_is_native(wrap: Callable, bert: Path, tmp_path: Path) -> None:
    """With its projection, where that has the right size; so it can be written in every layout."""
    theirs = clip_vit()
    nn.init.zeros_(theirs.head.bias)
    weights = save(wrap(theirs.state_dict()), tmp_path / "a.pt")
    made = compose({"vision": {"timm": CLIP, "weights": weights, "resolution": 64}, "text": {"bert": bert}}, 1)
    written = checkpoint.write(made, tmp_path / "out.pt", "cn_clip")
    for model in (
        build(CLIP, bert, weights),
        build(f"{CLIP}.openai", bert, weights),
        checkpoint.read(written).build(),
    ):
        assert model.config.is_vit
        with torch.no_grad():
            torch.testing.assert_close(model.encode_image(pixels()), theirs(pixels()), rtol=1e-5, atol=1e-5)
    other = build(CLIP, bert, weights, embed_dim=24)
    theirs.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(other.image_trunk(pixels()), theirs(pixels()), rtol=1e-5, atol=1e-5)
        assert other.encode_image(pixels()).shape == (2, 24)


def test_the_text_tower_is_bert(bert: Path) -> None:
    model, theirs = build("test_efficientnet", bert), some_bert()
    with torch.no_grad():
        cls = theirs(TEXT, attention_mask=TEXT.ne(0)).last_hidden_state[:, 0]
        torch.testing.assert_close(model.encode_text(TEXT), cls @ model.text_projection, rtol=1e-5, atol=1e-6)
    assert not [name for name in model.state_dict() if "pooler" in name]
    assert model.config.vocab_size == 20


def test_old_checkpoints_of_bert(tmp_path: Path) -> None:
    """``bert.`` in front, a pooler, heads of pretraining, and gamma and beta: what chinese-roberta-wwm-ext has."""
    theirs = some_bert(BertForPreTraining, seed=8)
    folder = write_bert(tmp_path, theirs)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for name, value in theirs.state_dict().items()
    }
    assert {name.split(".")[0] for name in state} == {"bert", "cls"}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = build("test_efficientnet", folder)
    with torch.no_grad():
        cls = theirs.bert(TEXT, attention_mask=TEXT.ne(0)).last_hidden_state[:, 0]
        torch.testing.assert_close(model.encode_text(TEXT), cls @ model.text_projection, rtol=1e-5, atol=1e-6)


def test_what_is_new_follows_from_the_seed(bert: Path) -> None:
    one, two, other = (build("test_vit", bert, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert {"text_projection", "visual.proj.weight", "visual.trunk.pos_embed"} <= differing
    assert not [name for name in differing if name.startswith("bert.")]


def test_settings(bert: Path) -> None:
    usual = timm.get_pretrained_cfg("test_efficientnet")
    config = build("test_efficientnet", bert, vision={"resolution": None}).config
    assert (config.image_resolution, config.embed_dim) == (usual.input_size[-1], 512)
    assert (config.vision_mean, config.vision_std) == (usual.mean, usual.std)
    assert config.context_length == 40  # no longer than the position table
    config = build(
        "test_efficientnet", bert, embed_dim=16, context_length=12,
        vision={"resolution": 96, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
    ).config  # fmt: skip
    assert (config.image_resolution, config.embed_dim, config.context_length) == (96, 16, 12)
    assert (config.vision_mean, config.vision_std) == ((0.1, 0.2, 0.3), (1, 1, 1))
    config = build(CLIP, bert).config
    assert (config.vision_mean, config.vision_std, config.vision_patch_size) == (CLIP_MEAN, CLIP_STD, 16)
    assert build(CLIP, bert, vision={"resolution": None}).config.image_resolution == 224


def test_dropout_is_berts(tmp_path: Path) -> None:
    folder = write_bert(tmp_path, some_bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0))
    config = build("test_efficientnet", folder).config
    assert (config.text_hidden_dropout_prob, config.text_attention_probs_dropout_prob) == (0.3, 0)


# ---------------------------------------------------------------- another resolution


def test_clips_positions_are_resized_as_upstream(bert: Path, tmp_path: Path) -> None:
    theirs = clip_vit(96)
    weights = save(theirs.state_dict(), tmp_path / "a.safetensors")
    model = build(CLIP, bert, weights)
    assert torch.equal(model.visual.pos_embed[0], resize_position_embedding(theirs.pos_embed[0].detach(), 17))


def test_other_positions_are_resized_as_timm(bert: Path, tmp_path: Path) -> None:
    theirs = randomised(timm.create_model("test_vit"))
    weights = save(theirs.state_dict(), tmp_path / "a.safetensors")
    model = build("test_vit", bert, weights)
    ours = timm.create_model("test_vit", img_size=64, num_classes=0).eval()
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = checkpoint_filter_fn(theirs.state_dict(), ours)
    ours.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    with torch.no_grad():
        torch.testing.assert_close(model.image_trunk(pixels()), ours(pixels()))


@pytest.mark.parametrize("size", [64, 96])
def test_towers_without_a_class_token(size: int, tmp_path: Path) -> None:
    """As SigLIP's: every row of the table is a patch."""
    trunk, theirs = (
        randomised(VisionTransformer(img_size=n, embed_dim=32, depth=1, num_heads=1, class_token=False, num_classes=0,
                                     global_pool="avg"))
        for n in (64, size)
    )  # fmt: skip
    weights = save(theirs.state_dict(), tmp_path / "a.pt")
    model = SimpleNamespace(config=SimpleNamespace(vision_timm="x"), visual=SimpleNamespace(trunk=trunk))
    composed._load_image_tower(model, weights, "a.json")
    wanted = resample_abs_pos_embed(theirs.pos_embed, new_size=[4, 4], num_prefix_tokens=0)
    assert torch.equal(trunk.pos_embed, wanted)


# ---------------------------------------------------------------- wrong parts


def spec(bert: Path, name: str = "test_efficientnet", **vision: Any) -> dict[str, Any]:
    return {"vision": {"timm": name, "resolution": 64, **vision}, "text": {"bert": str(bert)}}


def test_missing_parts(bert: Path) -> None:
    for half in ({}, {"vision": None}, {"vision": {"timm": "test_vit"}}, {"text": {"bert": str(bert)}}, {"text": {}}):
        refused(half, 'give both {"vision": {"timm": …}} and {"text": {"bert": …}}')


@pytest.mark.parametrize(
    ("name", "near"), [("test_efficientnett", "test_"), ("vit_base", "vit_"), ("猫", "timm has no '猫'"), ("../x", "")]
)
def test_names_that_timm_does_not_know(name: str, near: str, bert: Path) -> None:
    refused(spec(bert, name), f"timm has no {name!r}", near)


def test_weights_of_another_tower(bert: Path, tmp_path: Path) -> None:
    theirs = timm.create_model("test_efficientnet", num_classes=3)
    good = theirs.state_dict()
    wide = save(good | {"conv_stem.weight": torch.zeros(1, 3, 3, 3)}, tmp_path / "wide.pt")
    refused(spec(bert, weights=wide), f"vision.weights: {wide}: not this tower's", "conv_stem.weight (1, 3, 3, 3)")
    more = save(good | {"extra.weight": torch.zeros(1)}, tmp_path / "more.pt")
    refused(spec(bert, weights=more), "extra.weight (1,), where the tower has nothing")
    less = save({name: value for name, value in good.items() if name != "bn2.weight"}, tmp_path / "less.safetensors")
    refused(spec(bert, weights=less), "no bn2.weight")
    other = save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pt")
    refused(spec(bert, weights=other), "not this tower's", "where the tower has nothing")
    state = {name: value for name, value in good.items() if not name.endswith("num_batches_tracked")}
    assert build("test_efficientnet", bert, save(state, tmp_path / "old.pt"))  # before BatchNorm counted


def test_a_head_that_belongs_to_the_trunk(bert: Path, tmp_path: Path) -> None:
    """ConvNeXt's last norm is under ``head.``, beside the classifier."""
    good = timm.create_model("test_convnext", num_classes=0).state_dict()
    less = save({name: value for name, value in good.items() if name != "head.norm.weight"}, tmp_path / "less.pt")
    refused(spec(bert, "test_convnext", weights=less), "no head.norm.weight")
    wide = save(good | {"head.norm.weight": torch.zeros(3)}, tmp_path / "wide.pt")
    refused(spec(bert, "test_convnext", weights=wide), "head.norm.weight (3,)")


def test_positions_that_fit_no_grid(bert: Path, tmp_path: Path) -> None:
    for name, good in ((CLIP, clip_vit().state_dict()), ("test_vit", timm.create_model("test_vit").state_dict())):
        for shape in ((1, 8, 64), (17,)):
            odd = save(good | {"pos_embed": torch.zeros(shape)}, tmp_path / "odd.pt")
            refused(spec(bert, name, weights=odd), f"vision.weights: {odd}: ", "pos_embed")


def test_files_that_are_not_there(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"gone\.safetensors"):
        compose(spec(bert, weights=str(tmp_path / "gone.safetensors")))
    (tmp_path / "bad.pth").write_bytes(b"no tensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"bad\.pth"):
        compose(spec(bert, weights=tmp_path / "bad.pth"))


def test_berts_that_lack_something(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "a", some_bert(), vocab=False)
    refused(spec(folder), "text.bert", str(folder), "no vocab.txt there")
    folder = write_bert(tmp_path / "b", some_bert())
    (folder / "model.safetensors").unlink()
    refused(spec(folder), "text.bert", str(folder))
    folder = write_bert(tmp_path / "c", some_bert())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(spec(folder), "weights missing: encoder.layer.2.")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused(spec(folder), "text.bert", str(folder))
    (folder / "config.json").write_text("{")
    refused(spec(folder), "text.bert", str(folder))


@pytest.mark.parametrize(("key", "value"), [("embed_dim", 0.5), ("embed_dim", 10**9), ("context_length", 2)])
def test_numbers_of_no_use(key: str, value: Any, bert: Path) -> None:
    refused(spec(bert) | {key: value}, f"a.json: pretrained_model: {key}")


def test_resolutions_of_no_use(bert: Path) -> None:
    refused(spec(bert, CLIP, resolution=70), "image_resolution 70")
