"""The towers against cn_clip and transformers, at true shapes with random weights; and their switches."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cn_clip.clip.model import CLIP, resize_pos_embed

from modelscope_cnclip import checkpoint, keymaps
from modelscope_cnclip.towers import (
    ChineseCLIP,
    ConfigError,
    TowerConfig,
    configured_towers,
    resize_position_embedding,
)

from .conftest import CONFIGS, RESNET, VIT, make_model

SIZES = ["rn50", "vit-b-16", "vit-b-32", "vit-l-14", "vit-l-14-336", "vit-h-14"]


def upstream(config: TowerConfig) -> CLIP:
    """cn_clip's own model of the same shapes, uninitialised."""
    values = {key: value for key, value in config.vision_dict().items() if not key.startswith("vision_timm")}
    return CLIP(**values, **config.text_dict()).eval()


def upstream_with(state: dict[str, torch.Tensor], config: TowerConfig) -> CLIP:
    with torch.device("meta"):
        model = upstream(config)
    state = {"bert.pooler.dense.weight": torch.zeros(1), "bert.pooler.dense.bias": torch.zeros(1)} | state
    wanted = model.state_dict()
    state = {key: value for key, value in state.items() if key in wanted}
    model.load_state_dict(state, assign=True, strict=False)
    for module in model.modules():  # buffers that no checkpoint holds
        if isinstance(getattr(module, "position_ids", None), torch.Tensor):
            module.position_ids = torch.arange(config.text_max_position_embeddings)[None]
    return model


def tokens(count: int, config: TowerConfig) -> torch.Tensor:
    """Captions of several lengths, padded to upstream's 52."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(count, 52, dtype=torch.long)
    for row, length in enumerate(torch.linspace(4, 16, count).long().tolist()):
        ids[row, :length] = torch.randint(106, config.vocab_size, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 101, 102
    return ids


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)).abs().max().item()


@pytest.mark.parametrize("size", SIZES)
def test_true_shapes_equal_cn_clip_and_transformers(size: str, tmp_path: Path) -> None:
    """Normalised fp32 vectors to 1e-5 through all three layouts; H/14 with one picture, it needs 4 GB a copy."""
    config = TowerConfig.named(size)
    count = 1 if size in ("vit-h-14", "vit-l-14-336") else 2
    images = torch.randn(count, 3, config.image_resolution, config.image_resolution)
    texts = tokens(count + 1, config)
    cut = texts[:, : int(texts.ne(0).sum(1).max())]
    torch.manual_seed(0)
    state = keymaps.from_towers(dict(make_model(config).state_dict()))
    with torch.no_grad():
        reference = upstream_with(dict(state), config)
        theirs = reference.encode_image(images), reference.encode_text(texts)
        del reference
        layouts = ["modelscope", "cn_clip"] + (["transformers"] if config.is_vit else [])
        for layout in layouts:
            path = tmp_path / ("model.pt" if layout == "cn_clip" else layout)
            written = checkpoint.Checkpoint(path, "modelscope", config, state, checkpoint.layouts.default_vocab())
            checkpoint.write(written, path, layout)
            if layout == "transformers":
                from transformers import ChineseCLIPModel

                oracle = ChineseCLIPModel.from_pretrained(path).eval()
                assert (
                    largest_difference(oracle.get_image_features(pixel_values=images).pooler_output, theirs[0]) <= 1e-5
                )
                del oracle
            gc.collect()
            read = checkpoint.read(path)
            assert read.config == config
            ours = read.build()
            assert largest_difference(ours.encode_image(images), theirs[0]) <= 1e-5
            assert largest_difference(ours.encode_text(cut), theirs[1]) <= 1e-5
            del ours, read
            for file in [path] if path.is_file() else list(path.iterdir()):
                file.unlink()  # 4 GB each
            gc.collect()


def test_transformers_text_tower_agrees(make_folder) -> None:
    from transformers import ChineseCLIPModel

    folder = make_folder("vit", "transformers")
    texts = tokens(3, VIT)
    with torch.no_grad():
        oracle = ChineseCLIPModel.from_pretrained(folder).eval()
        theirs = oracle.get_text_features(input_ids=texts, attention_mask=texts.ne(0).long()).pooler_output
        ours = checkpoint.read(folder).build().encode_text(texts)
    assert largest_difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("width", [768, 1024])
def test_position_table_resizes_as_upstream_does(width: int) -> None:
    table = torch.randn(1 + 14 * 14, width)
    state = {"visual.positional_embedding": table.clone()}

    class Visual:
        grid_size = 24

    class Model:
        visual = Visual()

    resize_pos_embed(state, Model())
    assert torch.equal(resize_position_embedding(table, 1 + 24 * 24), state["visual.positional_embedding"])
    with pytest.raises(ConfigError, match="square"):
        resize_position_embedding(table, 1 + 24 * 25)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_another_resolution(tower: str, make_folder) -> None:
    model = checkpoint.read(make_folder(tower)).build(resolution=96)
    assert model.config.image_resolution == 96
    assert model.encode_image(torch.zeros(2, 3, 96, 96)).shape == (2, 32)


@pytest.mark.parametrize("tower", list(CONFIGS))
def test_gradient_checkpointing_changes_no_gradient(tower: str) -> None:
    images, texts = torch.randn(4, 3, 64, 64), tokens(4, VIT)[:, :16]

    def gradients(enable: bool) -> list[torch.Tensor]:
        model = make_model(CONFIGS[tower])
        model.set_grad_checkpointing(enable)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in model.bert.modules():
            if hasattr(layer, "dropout_prob"):
                layer.dropout_prob = 0.0
        torch.manual_seed(0)
        out = model(images, texts)
        (out["image_features"] @ out["text_features"].T * out["logit_scale"]).logsumexp(0).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, saved = gradients(False), gradients(True)
    assert len(plain) == len(saved) > 50
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_patch_dropout_drops_patches_in_training_only() -> None:
    model = make_model(VIT)
    images = torch.randn(2, 3, 64, 64)
    seen: list[int] = []
    model.visual.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    model.set_patch_dropout(0.5)
    model.train().encode_image(images)
    model.eval().encode_image(images)
    model.set_patch_dropout(0.0)
    model.train().encode_image(images)
    assert seen == [1 + 8, 1 + 16, 1 + 16]
    with pytest.raises(ConfigError, match="ViT"):
        make_model(RESNET).set_patch_dropout(0.5)


def test_any_timm_backbone_by_name() -> None:
    config = replace(VIT, vision_layers=None, vision_width=None, vision_patch_size=None, vision_timm="test_vit")
    assert ChineseCLIP(config).encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 32)
    with pytest.raises(ConfigError, match="no_such_net"):
        ChineseCLIP(replace(config, vision_timm="no_such_net"))


@pytest.mark.parametrize("size", SIZES)
def test_configurations_are_cn_clips_own(size: str) -> None:
    """Key for key what cn_clip ships, for every key that cn_clip's model takes."""
    import cn_clip.clip

    folder = Path(cn_clip.clip.__file__).parent / "model_configs"
    text = {"rn50": "RBT3-chinese", "vit-h-14": "RoBERTa-wwm-ext-large-chinese"}
    names = {"rn50": "RN50", "vit-b-16": "ViT-B-16", "vit-b-32": "ViT-B-32", "vit-l-14": "ViT-L-14",
             "vit-l-14-336": "ViT-L-14-336", "vit-h-14": "ViT-H-14"}  # fmt: skip
    values = json.loads((folder / f"{names[size]}.json").read_text())
    values |= json.loads((folder / f"{text.get(size, 'RoBERTa-wwm-ext-base-chinese')}.json").read_text())
    assert TowerConfig.from_dict(values) == TowerConfig.named(size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_layers": "__import__('os')"}, "vision_layers"),
        ({"vision_layers": 10**9}, "vision_layers"),
        ({"vision_layers": [3, 4]}, "four stages"),
        ({"embed_dim": "512"}, "embed_dim"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"vision_width": None}, "vision_width"),
        ({"vision_patch_size": None}, "vision_patch_size"),
        ({"vision_head_width": 60}, "multiple"),
        ({"text_num_attention_heads": 7}, "multiple"),
        ({"context_length": 2}, "context_length"),
        ({"context_length": 513}, "context_length"),
    ],
)
def test_configurations_that_make_no_sense(change: dict, message: str) -> None:
    values = json.loads(configured_towers()["vit-b-16"].read_text(encoding="utf-8")) | change
    with pytest.raises(ConfigError, match=message):
        TowerConfig.from_dict(values)


def test_missing_keys_and_unknown_names_are_told() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        TowerConfig.from_dict({"embed_dim": 512, "image_resolution": 224})
    with pytest.raises(ConfigError, match="vit-b-16"):
        TowerConfig.named("vit-b-17")
