"""Weights of rewards: local files and folders, the hub, and what is refused."""

import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file

from full_scale.rewards import load
from full_scale.rewards.weights import SUFFIXES, read_state_dict
from tests.tiny_rewards import PROMPTS, every_reward, random_images, refusal, tiny_folder, tiny_reward, use_tiny_vit

huggingface_hub = pytest.importorskip("huggingface_hub")


def weights_file(folder):
    """The file that holds the tiny model's tensors."""
    (file,) = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
    return file


@pytest.mark.parametrize("name", ["pickscore", "hpsv3", "imagereward"])
def test_the_weights_file_itself_may_be_given(name):
    folder, images = tiny_folder(name), random_images()
    assert torch.equal(load(name, [weights_file(folder)])(images, PROMPTS), load(name, [folder])(images, PROMPTS))


def test_hpsv3_in_bfloat16_keeps_its_head_in_float32():
    reward, images = tiny_reward("hpsv3", precision=torch.bfloat16), random_images().requires_grad_()
    assert {p.dtype for p in reward.body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(tiny_reward("hpsv3")(images, PROMPTS).tolist(), abs=2e-2)
    scores.sum().backward()
    assert images.grad.any()


def without_network(*_, **options):
    raise OSError("no network\nand more lines")


@every_reward
def test_a_local_folder_needs_no_network(name, monkeypatch):
    attempts = []  # a library may catch the error
    for owner, function in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, function, lambda *_: attempts.append(1) or without_network())
    tiny_reward(name)
    assert not attempts


@every_reward
def test_an_unreachable_hub_is_reported_in_one_line(name, monkeypatch):
    tiny_folder(name)  # skips the test if the reward's library is not installed
    monkeypatch.setattr(huggingface_hub, "snapshot_download", without_network)
    for weights in [], ["somebody/something"]:
        line = refusal(load, name, weights)
        assert all(words in line for words in ("/", "cannot be reached", "--reward-weights", "hf download"))


HUB = {
    "hpsv2.1": {"xswu/HPSv2": "HPS_v2.1_compressed.pt"},
    "pickscore": {
        "yuvalkirstain/PickScore_v1": "config.json model.safetensors",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "tokenizer*",
    },
    "hpsv3": {"MizzenAI/HPSv3": "HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct": "config.json tokenizer*"},
    "imagereward": {
        "THUDM/ImageReward": "ImageReward.pt med_config.json",
        "google-bert/bert-base-uncased": "tokenizer*",
    },
}


@every_reward
def test_a_reward_downloads_the_files_that_it_needs(name, monkeypatch, tmp_path):
    """The hub is a local folder here: the tiny model's files, distributed over the official repositories."""
    folder, requested = tiny_folder(name), {}
    if name == "hpsv2.1":
        use_tiny_vit(monkeypatch)
        torch.save({"state_dict": read_state_dict(weights_file(folder))}, tmp_path / "HPS_v2.1_compressed.pt")

    def snapshot_download(repository, allow_patterns, **_):
        requested[repository] = set(allow_patterns)
        (tmp_path / repository).mkdir(parents=True)
        for file in [file for source in (folder, tmp_path) for p in allow_patterns for file in source.glob(p)]:
            (tmp_path / repository / file.name).symlink_to(file)
        return str(tmp_path / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    scores = load(name)(random_images(), PROMPTS)
    assert torch.equal(scores, tiny_reward(name)(random_images(), PROMPTS))
    assert requested.keys() == HUB[name].keys()
    assert all(set(files.split()) <= requested[repository] for repository, files in HUB[name].items())


MISSING = ["no/such/folder", "weights/missing.safetensors", "nothing", "/no/where"]


def rename_a_key(folder):
    """In the weights: one is missing, one unexpected."""
    file = weights_file(folder)
    state = {key: value.clone() for key, value in read_state_dict(file).items()}  # they may be mapped from the file
    state["stranger"] = state.pop(max(key for key in state if key.endswith("weight") and "lm_head" not in key))
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)


DAMAGES = {
    **{path: (lambda folder: None, (f"{path} does not exist",)) for path in MISSING},
    "other keys": (rename_a_key, ("weights (1 missing, such as ", "; 1 unexpected, such as stranger)")),
    "no weights": (lambda folder: weights_file(folder).write_bytes(b"<html>not found</html>"), ("cannot be read",)),
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], ()),
}


@every_reward
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(name, damage, tmp_path):
    shutil.copytree(tiny_folder(name), tmp_path, dirs_exist_ok=True)
    (spoil, words), path = DAMAGES[damage], damage if damage in MISSING else tmp_path
    spoil(tmp_path)
    line = refusal(load, name, [path])
    assert all(word in line for word in (str(path), *words))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_folder("pickscore") / name)
    words = "copy the tokenizer files of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert words in refusal(load, "pickscore", [tmp_path])
