"""How replicas are started: command lines, GPUs; and the names of a model's tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from matrix_bus.errors import UsageError
from matrix_serving import hf
from matrix_serving.backends import Wanted, command, sglang, shares_of_gpus, vllm

PYTHON = "/opt/gpu/bin/python"


def test_vllm_with_two_gpus() -> None:
    launch = vllm(Wanted("org/big", "", ("--max-model-len", "8192"), ("2", "3"), PYTHON))
    assert launch.name == "org/big"
    assert launch.environment == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert " ".join(launch.words) == (
        f"{PYTHON} -m vllm.entrypoints.openai.api_server --model org/big --served-model-name org/big "
        "--host {host} --port {port} --tensor-parallel-size 2 --max-model-len 8192"
    )


def test_sglang_with_a_name_and_one_gpu() -> None:
    launch = sglang(Wanted("org/big", "big", (), ("0",), PYTHON))
    assert (launch.name, launch.environment) == ("big", {"CUDA_VISIBLE_DEVICES": "0"})
    assert " ".join(launch.words) == (
        f"{PYTHON} -m sglang.launch_server --model-path org/big --served-model-name big "
        "--host {host} --port {port} --enable-metrics"
    )


def test_without_gpus_the_server_sees_what_it_finds() -> None:
    launch = vllm(Wanted("org/small", python=PYTHON))
    assert launch.environment == {}
    assert "--tensor-parallel-size" not in launch.words


def test_what_is_not_installed_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"sglang is not installed in this environment.*--python"):
        sglang(Wanted("org/big"))
    with pytest.raises(UsageError, match="needs a command after --"):
        command(Wanted("big"))


@pytest.mark.parametrize(
    ("given", "visible", "replicas", "each", "shares"),
    [
        ("0, 1,2,3", None, 2, 2, [("0", "1"), ("2", "3")]),
        ("0,1", "7", 2, 1, [("0",), ("1",)]),
        ("", "GPU-a,GPU-b,GPU-c", 2, 1, [("GPU-a",), ("GPU-b",)]),
        ("", "", 3, 1, [(), (), ()]),
    ],
)
def test_gpus_are_shared_out(
    given: str,
    visible: str | None,
    replicas: int,
    each: int,
    shares: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shares_of_gpus(given, replicas, each) == shares


def test_the_gpus_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: GPU-2)'\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shares_of_gpus("", 2, 1) == [("0",), ("1",)]
    monkeypatch.setenv("PATH", "")
    assert shares_of_gpus("", 2, 1) == [(), ()]


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match=r"2 replicas with 2 GPUs each need 4, there are 3: 0, 1, 2;"):
        shares_of_gpus("0,1,2", 2, 2)
    with pytest.raises(UsageError, match=r"1 replicas with 4 GPUs each need 4, there are 0: none found;.*--gpus"):
        shares_of_gpus("", 1, 4)


# --- a GGUF file as a Hugging Face folder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("llama", "hugging_face"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.29.ffn_norm.weight", "model.layers.29.post_attention_layernorm.weight"),
    ],
)
def test_names_of_tensors(llama: str, hugging_face: str) -> None:
    assert hf.hf_name(llama) == hugging_face


@pytest.mark.parametrize("name", ["blk.0.ssm_conv1d.weight", "rope_freqs.weight"])
def test_a_tensor_of_another_family_has_no_name(name: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        hf.hf_name(name)


def test_what_the_converter_cannot_do_is_said_in_a_line(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    for words, said in (
        ([], "MODEL.gguf FOLDER"),
        ([str(tmp_path / "none.gguf"), str(tmp_path / "out")], "none.gguf: No such file"),
        ([__file__, str(tmp_path / "out")], "is not a GGUF file"),
        ([str(model), str(tmp_path)], "exists already"),
    ):
        done = subprocess.run([sys.executable, hf.__file__, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    assert not (tmp_path / "out").exists()
