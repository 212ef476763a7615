"""What trained tiny-wan: the drawn world, the whole-clip VAE, the folding of latent statistics, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightx2v.eval.detector import detect
from tools.train_tiny import clip_vae, export, text, world
from tools.train_tiny.checkpoint import load_state, save_state


def test_whole_clip_passes_equal_the_chunked_ones() -> None:
    torch.manual_seed(0)
    vae = clip_vae.build_vae()
    clips = world.render(world.random_scenes(1, torch.Generator().manual_seed(0)), frames=9, size=32)
    with torch.no_grad():
        mean = vae.encode(clips).latent_dist.mean
        drawn = vae.decode(mean).sample
        clip_vae.as_clip_vae(vae)
        whole_mean, _ = clip_vae.encode(vae, clips)
        whole_drawn = clip_vae.decode(vae, whole_mean).clamp(-1, 1)
    assert torch.allclose(whole_mean, mean, atol=1e-5)
    assert torch.allclose(whole_drawn, drawn, atol=1e-4)


def test_folded_statistics_normalize_and_decode_alike() -> None:
    torch.manual_seed(0)
    vae = clip_vae.build_vae()
    clips = world.render(world.random_scenes(1, torch.Generator().manual_seed(0)), frames=5, size=32)
    mean = torch.randn(1, 16, 1, 1, 1)
    std = torch.rand(1, 16, 1, 1, 1) + 0.5
    with torch.no_grad():
        before = vae.encode(clips).latent_dist.mean
        drawn = vae.decode(before).sample
        export.fold_latent_statistics(vae, mean, std)
        after = vae.encode(clips).latent_dist.mean
        wan_mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        wan_std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        assert torch.allclose((after - wan_mean) / wan_std, (before - mean) / std, atol=1e-4)
        assert torch.allclose(vae.decode(after).sample, drawn, atol=1e-4)


def test_the_world_has_every_combination_once() -> None:
    prompts = [scene.prompt for scene in world.all_scenes()]
    assert len(prompts) == len(set(prompts)) == 6 * 3 * 3 * 7


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_the_detector_reads_what_was_drawn(motion: str) -> None:
    scene = world.Scene("purple", "triangle", "gray", motion, 0.05, -0.05)
    frames = ((world.render([scene])[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    found = detect(frames)
    assert (found.color, found.shape, found.background, found.motion) == ("purple", "triangle", "gray", motion)


def test_tokenizer_gives_the_ids_that_training_used(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text.write_tokenizer(tmp_path)
    prompts = [scene.prompt for scene in world.all_scenes()[::37]] + [""]
    tokens = AutoTokenizer.from_pretrained(tmp_path)(
        prompts, padding="max_length", truncation=True, max_length=text.TEXT_LEN, return_tensors="pt"
    )
    ids, mask = text.tokenize(prompts)
    assert torch.equal(tokens.input_ids, ids)
    assert torch.equal(tokens.attention_mask, mask)


def test_training_state_is_written_whole(tmp_path: Path) -> None:
    assert load_state(tmp_path / "x.pt") is None
    save_state(tmp_path / "x.pt", {"step": 3, "w": torch.ones(2)})
    state = load_state(tmp_path / "x.pt")
    assert state is not None and state["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
