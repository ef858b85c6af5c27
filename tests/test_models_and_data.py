"""Models, data and accuracy of the experiments; no test touches the network."""

import hashlib
import importlib.machinery
import io
import os
import sys
import tarfile
import types
import urllib.error
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data, download
from experiments.evaluate import top1
from experiments.models import digits, pretrained, resnet_cifar
from jaxcompress.core.files import replacing

pytestmark = pytest.mark.broad

needs_data = pytest.mark.skipif(
    not os.environ.get(data.DATA_VARIABLE),
    reason=f"{data.DATA_VARIABLE} is unset: name a folder with cifar-10-batches-bin/ and "
    "resnet20_cifar10.npz, resnet32_cifar10.npz",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Opens file:// addresses only."""
    opener = download.urllib.request.urlopen

    def local_only(url, timeout):
        if not url.startswith("file://"):
            raise urllib.error.URLError("no network in tests")
        return opener(url, timeout=timeout)

    monkeypatch.setattr(download.urllib.request, "urlopen", local_only)


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """An empty data folder."""
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data"


def remote_of(path: Path, algorithm: str) -> download.Remote:
    digest = hashlib.new(algorithm, path.read_bytes()).hexdigest()
    return download.Remote(path.as_uri(), algorithm, digest)


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------- download


def test_fetch_writes_the_verified_file_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"weights" * 100_000)
    target = tmp_path / "new" / "target"
    assert download.fetch(remote_of(source, "sha256"), target, remedy="-") == target
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_fetch_refuses_other_bytes_and_keeps_nothing(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    remote = download.Remote(source.as_uri(), "md5", "0" * 32)
    with pytest.raises(
        ValueError, match=r"source is truncated or corrupt: its md5 is \w+, expecte"
    ):
        download.fetch(remote, tmp_path / "new" / "target", remedy="-")
    assert not list((tmp_path / "new").iterdir())


def test_fetch_works_without_rich(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    target = download.fetch(remote_of(source, "md5"), tmp_path / "target", remedy="-")
    assert target.read_bytes() == b"weights"


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as target:
        target.write(b"half of the ne")
        raise RuntimeError
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def make_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("in/b.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_extract_takes_named_regular_files_only(tmp_path):
    files = {"../evil": b"x", "/absolute": b"x", "in/a.bin": b"a", "in/b.bin": b"b"}
    archive = make_archive(tmp_path / "archive.tar.gz", files)
    out = tmp_path / "deep" / "out"
    download.extract(archive, out, members=["in/a.bin", "in/b.bin"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        "a.bin": b"a",
        "b.bin": b"b",
    }
    assert not (out / "b.bin").is_symlink()
    assert not (tmp_path / "deep" / "evil").exists()
    with pytest.raises(ValueError, match=r"archive\.tar\.gz lacks \['in/c\.bin'\]"):
        download.extract(archive, out, members=["in/a.bin", "in/c.bin"])


def test_extract_names_a_truncated_archive(tmp_path):
    noise = np.random.default_rng(0).bytes(50_000)
    archive = make_archive(tmp_path / "archive.tar.gz", {"in/a.bin": noise})
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"archive\.tar\.gz could not be unpacked"):
        download.extract(archive, tmp_path / "out", members=["in/a.bin"])
    assert not list((tmp_path / "out").iterdir())


# -------------------------------------------------------------------------------------------- data


def test_data_dir_is_the_variable_else_the_cache(monkeypatch):
    monkeypatch.setenv(data.DATA_VARIABLE, "/somewhere")
    assert data.data_dir() == Path("/somewhere")
    monkeypatch.delenv(data.DATA_VARIABLE)
    assert data.data_dir() == Path.home() / ".cache" / "jaxcompress"


def test_digits_split_is_stratified_and_its_test_images_do_not_depend_on_the_seed():
    one, two = data.load_digits_split(1), data.load_digits_split(2)
    assert [leaf.shape for leaf in one] == [(1297, 8, 8, 1), (1297,), (500, 8, 8, 1), (500,)]
    assert [leaf.dtype for leaf in one] == [np.float32, np.int32, np.float32, np.int32]
    np.testing.assert_array_equal(one.test_images, two.test_images)
    np.testing.assert_array_equal(one.test_labels, two.test_labels)
    assert not np.array_equal(one.train_labels, two.train_labels)
    # the whole set is there, once: 1797 images whose pixels k/16 are exact in float32
    everything = np.concatenate([one.train_images, one.test_images]).reshape(1797, 64)
    assert len(np.unique(everything, axis=0)) == 1797
    assert (everything.min(), everything.max()) == (0, 1)
    counts = np.bincount(np.concatenate([one.train_labels, one.test_labels]), minlength=10)
    shares = np.bincount(one.test_labels, minlength=10) - counts * 500 / 1797
    assert np.abs(shares).max() < 1


def test_standardised_digits_have_mean_zero_and_deviation_one_on_the_training_images():
    split = data.load_digits_split(0, standardise=True)
    assert split.train_images.dtype == np.float32
    assert abs(split.train_images.mean(dtype=np.float64)) < 1e-6
    assert abs(split.train_images.std(dtype=np.float64) - 1) < 1e-6
    assert split.test_images.mean() != 0


def cifar10_bytes(*, first_label: int = 3) -> bytes:
    """10,000 records; in each, the value of a pixel tells its plane, row and column."""
    planes = np.arange(3)[:, None, None] * 64 + np.arange(32)[:, None] + np.arange(32)
    records = np.zeros((10_000, 3073), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    records[0, 0] = first_label
    records[:, 1:] = planes.reshape(-1)
    return records.tobytes()


def test_cifar10_file_layout(folder):
    path = folder / data.CIFAR10_FOLDER / "test_batch.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(cifar10_bytes())
    images, labels = data.load_cifar10("test")
    assert (images.shape, images.dtype) == ((10_000, 32, 32, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((10_000,), np.int32)
    assert labels[:4].tolist() == [3, 1, 2, 3]
    assert images[7, 5, 9].tolist() == [14, 78, 142]  # 64 plane + row + column

    path.write_bytes(cifar10_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"test_batch\.bin is truncated or corrupt: 30729999 bytes"
    ):
        data.load_cifar10("test")
    path.write_bytes(cifar10_bytes(first_label=10))
    with pytest.raises(ValueError, match=r"test_batch\.bin is corrupt: label 10"):
        data.load_cifar10("test")


def test_cifar10_is_downloaded_once_and_the_archive_removed(folder, tmp_path, monkeypatch):
    names = [name for files in data.CIFAR10_FILES.values() for name in files]
    files = {f"{data.CIFAR10_FOLDER}/{name}": b"" for name in names}
    files[f"{data.CIFAR10_FOLDER}/test_batch.bin"] = cifar10_bytes()
    archive = make_archive(tmp_path / "cifar.tar.gz", files)
    monkeypatch.setattr(data, "CIFAR10_ARCHIVE", remote_of(archive, "md5"))
    assert data.load_cifar10("test")[1][0] == 3
    assert [path.name for path in folder.iterdir()] == [data.CIFAR10_FOLDER]
    archive.unlink()
    assert data.load_cifar10("test")[1][0] == 3


def test_cifar10_offline_says_what_to_set(folder):
    message = (
        r"cifar-10-binary\.tar\.gz does not exist and could not be downloaded from https://www\.cs"
        r".*no network.*set JAXCOMPRESS_DATA to a folder that holds cifar-10-batches-bin/"
    )
    with pytest.raises(FileNotFoundError, match=message):
        data.load_cifar10("test")
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\], got 'valid'"):
        data.load_cifar10("valid")  # pyright: ignore[reportArgumentType]


def test_a_corrupt_archive_put_there_by_hand_is_named(folder):
    folder.mkdir()
    (folder / "cifar-10-binary.tar.gz").write_bytes(b"half an archive")
    with pytest.raises(ValueError, match=r"data/cifar-10-binary\.tar\.gz is truncated or corrupt"):
        data.load_cifar10("test")


def test_cifar10_normalise_by_hand_and_only_once():
    x = jnp.array([[255, 0, 51]], jnp.uint8)
    y = jax.jit(data.cifar10_normalise)(x)
    expected = [[(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]]
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="must be uint8 pixels in 0..255, got float32"):
        data.cifar10_normalise(y)


# ------------------------------------------------------------------------------------------ models


def random_variables(depth: int, *, width: int = 16):
    """Variables of the standard variant whose BatchNorm is not the identity."""
    model = resnet_cifar.ResNetCifar(depth, width=width)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    draw = {
        "kernel": lambda shape: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])),
        "var": lambda shape: rng.uniform(0.5, 2, shape),
        "scale": lambda shape: rng.uniform(0.5, 1.5, shape),
    }

    def leaf(path, shape):
        value = draw.get(path[-1].key, lambda shape: rng.normal(size=shape) / 4)(shape.shape)
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.mark.parametrize(
    ("depth", "standard", "folded"),
    [
        (20, 269_722, 269_034),
        (32, 464_154, 463_018),
        (44, 658_586, 657_002),
        (56, 853_018, 850_986),
    ],
)
def test_resnet_parameter_counts(depth, standard, folded):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    for unit, count in ((resnet_cifar.conv_batch_norm, standard), (resnet_cifar.conv_bias, folded)):
        model = resnet_cifar.ResNetCifar(depth, unit=unit)
        assert size(jax.eval_shape(model.init, jax.random.key(0), images)["params"]) == count


def test_option_a_shortcut_by_hand():
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1) + 1
    y = resnet_cifar.shortcut_a(x, features=3, stride=2)
    assert y.shape == (1, 2, 2, 3)
    assert y[0, :, :, 1].tolist() == [[1, 3], [9, 11]]  # every second row and column
    assert not y[..., 0].any() and not y[..., 2].any()


def test_folding_is_the_closed_form():
    # one channel: gamma 3, beta 1, mu 2, sigma^2 + eps = 4: factor 3/2, bias 1 - 2 * 3/2
    eps = resnet_cifar.BATCH_NORM_EPSILON
    kernel = jnp.array([2.0, -4.0]).reshape(1, 1, 2, 1)
    norm = {"scale": jnp.array([3.0]), "bias": jnp.array([1.0])}
    stats = {"mean": jnp.array([2.0]), "var": jnp.array([4 - eps])}
    variables = {
        "params": {"conv1": {"kernel": kernel}, "bn1": norm, "linear": {"bias": jnp.ones(2)}},
        "batch_stats": {"bn1": stats},
    }
    folded = resnet_cifar.fold_batch_norm(variables)
    assert set(folded) == {"conv1", "linear"}
    np.testing.assert_allclose(folded["conv1"]["kernel"].ravel(), [3, -6], rtol=1e-6)
    np.testing.assert_allclose(folded["conv1"]["bias"], [-2], rtol=1e-6)
    with pytest.raises(ValueError, match=r"variables lack \['batch_stats', 'params'\].*\['conv1',"):
        resnet_cifar.fold_batch_norm(folded)


def test_folded_logits_agree_for_another_width_and_train_uses_the_batch():
    variables = random_variables(20, width=8)
    folded = resnet_cifar.fold_batch_norm(variables)
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    expected = jax.jit(resnet_cifar.standard_apply_fn(20, width=8))(variables, x)
    assert resnet_cifar.standard_apply_fn(20, width=8) is resnet_cifar.standard_apply_fn(
        20, width=8
    )
    actual = jax.jit(resnet_cifar.folded_apply_fn(20, width=8))(folded, x)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * float(jnp.abs(expected).max()))
    model = resnet_cifar.ResNetCifar(20, width=8)
    train_fn = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    trained, changed = train_fn(variables, x)
    assert not np.allclose(trained, expected, atol=0.1)
    old, new = variables["batch_stats"]["bn1"]["mean"], changed["batch_stats"]["bn1"]["mean"]
    assert not np.allclose(old, new)


def test_resnet_says_what_would_be_right():
    key, images = jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"depth must be one of \(20, 32, 44, 56\), got 21"):
        resnet_cifar.ResNetCifar(21).init(key, images)
    with pytest.raises(ValueError, match="width must be even and positive, got 7"):
        resnet_cifar.ResNetCifar(20, width=7).init(key, images)
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\], got \(1, 3, 32, 32\)"):
        resnet_cifar.ResNetCifar(20).init(key, jnp.zeros((1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("model", "count"), [(digits.teacher(), 87_178), (digits.student(), 10_858)]
)
def test_digits_networks(model, count):
    images = jnp.asarray(data.load_digits_split(0).test_images[:4])
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    assert size(params) == count
    logits = jax.jit(digits.apply_fn(model))(params, images)
    assert (logits.shape, logits.dtype) == ((4, 10), jnp.float32)
    with pytest.raises(ValueError, match=r"images must be \[B, 8, 8, 1\], got \(4, 64\)"):
        model.apply({"params": params}, images.reshape(4, 64))


# -------------------------------------------------------------------------------------- pretrained


def torch_arrays(variables) -> dict[str, np.ndarray]:
    """PyTorch names and layouts, written out independently of the loader."""
    params, stats = variables["params"], variables["batch_stats"]
    arrays = {
        "linear.weight": np.asarray(params["linear"]["kernel"]).T,
        "linear.bias": np.asarray(params["linear"]["bias"]),
    }
    modules = {"": (params, stats)}
    for stage in (1, 2, 3):
        for i in range(3):
            name = f"layer{stage}_{i}"
            modules[f"layer{stage}.{i}."] = (params[name], stats[name])
    for prefix, (p, s) in modules.items():
        for i in (1, 2) if prefix else (1,):
            kernel = np.asarray(p[f"conv{i}"]["kernel"])
            arrays[f"{prefix}conv{i}.weight"] = np.einsum("hwio->oihw", kernel)
            arrays[f"{prefix}bn{i}.weight"] = np.asarray(p[f"bn{i}"]["scale"])
            arrays[f"{prefix}bn{i}.bias"] = np.asarray(p[f"bn{i}"]["bias"])
            arrays[f"{prefix}bn{i}.running_mean"] = np.asarray(s[f"bn{i}"]["mean"])
            arrays[f"{prefix}bn{i}.running_var"] = np.asarray(s[f"bn{i}"]["var"])
    return arrays


def fake_torch(load) -> types.ModuleType:
    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", loader=None)
    torch.load = load  # pyright: ignore[reportAttributeAccessIssue]
    return torch


def test_weights_come_back_from_a_checkpoint(folder, tmp_path, monkeypatch):
    variables = random_variables(20)
    source = tmp_path / "resnet20-00000000.th"
    source.write_bytes(b"a checkpoint")
    monkeypatch.setattr(pretrained, "CHECKPOINTS", {20: remote_of(source, "sha256")})

    def load(path, *, map_location, weights_only):
        assert Path(path).read_bytes() == b"a checkpoint" and weights_only
        tensor = lambda array: types.SimpleNamespace(numpy=lambda: array)
        state = {f"module.{k}": tensor(a) for k, a in torch_arrays(variables).items()}
        return {"state_dict": state | {"module.bn1.num_batches_tracked": tensor(np.zeros(()))}}

    monkeypatch.setitem(sys.modules, "torch", fake_torch(load))
    loaded = resnet_cifar.load_pretrained(20)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)

    monkeypatch.setitem(sys.modules, "torch", None)
    assert (
        pretrained.weights_file(20) == folder / "resnet20_cifar10.npz"
    )  # now the file comes first


def test_missing_weights_say_what_to_do(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    message = r"resnet32-d509ac18\.th needs PyTorch: pip install torch, or provide resnet32_cifar10"
    with pytest.raises(FileNotFoundError, match=message):
        resnet_cifar.load_pretrained(32)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(None))
    message = r"no network.*provide resnet20_cifar10\.npz under JAXCOMPRESS_DATA"
    with pytest.raises(FileNotFoundError, match=message):
        resnet_cifar.load_pretrained(20)
    (folder / "resnet20-12fca82f.th").write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match=r"resnet20-12fca82f\.th is truncated or corrupt"):
        resnet_cifar.load_pretrained(20)
    with pytest.raises(ValueError, match=r"depth must be one of \(20, 32, 44, 56\), got 18"):
        resnet_cifar.load_pretrained(18)


def test_a_broken_weights_file_is_named(folder):
    folder.mkdir()
    path = folder / "resnet20_cifar10.npz"
    arrays = torch_arrays(random_variables(20))
    with path.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (whole[:-1000], whole[:100], b"", b"text", bytes(flipped)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"resnet20_cifar10\.npz is truncated or corrupt"):
            resnet_cifar.load_pretrained(20)
    changes = {
        r"corrupt: linear\.bias holds values that are not finite": np.full(10, np.nan, np.float32),
        r"not a ResNet-20: params/linear/bias: \(7,\), not \(10,\)": np.zeros(7, np.float32),
    }
    for message, bias in changes.items():
        with path.open("wb") as file:
            np.savez(file, **arrays | {"linear.bias": bias})  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=message):
            resnet_cifar.load_pretrained(20)
    path.rename(folder / "resnet32_cifar10.npz")
    with pytest.raises(ValueError, match=r"not a ResNet-32: .*layer1_3/.*: nothing, not"):
        resnet_cifar.load_pretrained(32)


# ---------------------------------------------------------------------------------------- accuracy


def test_top1_counts_by_hand_and_compiles_once():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(103, 7)).astype(np.float32)
    labels = np.argmax(images, axis=-1)
    labels[:10] = (labels[:10] + 1) % 7  # ten wrong ones
    traces, done = [], []

    def apply_fn(scale, x):
        traces.append(x.shape)
        return x * scale

    for scale in (2.0, 3.0):
        predict = jax.tree_util.Partial(apply_fn, jnp.float32(scale))
        accuracy = top1(
            predict, images, labels, batch_size=25, threads=2, progress=lambda *a: done.append(a)
        )
        assert accuracy == 100 * 93 / 103
    assert traces == [(25, 7)]  # one program: ragged tail, threads and new weights included
    assert done[:5] == [(25, 103), (50, 103), (75, 103), (100, 103), (103, 103)]
    negative = jax.tree_util.Partial(apply_fn, jnp.float32(-1))
    assert top1(negative, images, labels, batch_size=500, threads=1) < 50


def test_top1_errors_and_nan():
    images, labels = np.ones((4, 3), np.float32), np.zeros(4, np.int64)
    assert top1(lambda x: x * jnp.nan, images, labels) == 0
    with pytest.raises(ValueError, match=r"labels must be \[N\] with N = 4 > 0 images, got \(3,\)"):
        top1(lambda x: x, images, labels[:3])
    with pytest.raises(ValueError, match=r"N = 0 > 0 images"):
        top1(lambda x: x, images[:0], labels[:0])
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        top1(lambda x: x, images, labels, batch_size=0)
    with pytest.raises(
        ValueError, match=r"must give logits \[B, C\] for images \(4, 3\), got \(4,\)"
    ):
        top1(lambda x: x.sum(axis=-1), images, labels)


def predict_pixels(apply_fn, params):
    predict = lambda params, pixels: apply_fn(params, data.cifar10_normalise(pixels))
    return jax.tree_util.Partial(predict, params)


@needs_data
@pytest.mark.parametrize("depth", [20, 32])
def test_pretrained_and_folded_resnets_agree(depth):
    images, labels = data.load_cifar10("test")
    images, labels = images[:500], labels[:500]
    variables = resnet_cifar.load_pretrained(depth)
    folded = resnet_cifar.fold_batch_norm(variables)
    standard_fn = jax.jit(resnet_cifar.standard_apply_fn(depth))
    folded_fn = jax.jit(resnet_cifar.folded_apply_fn(depth))
    x = data.cifar10_normalise(images[:100])
    np.testing.assert_allclose(folded_fn(folded, x), standard_fn(variables, x), rtol=0, atol=1e-4)
    accuracy = top1(predict_pixels(standard_fn, variables), images, labels)
    assert accuracy == top1(predict_pixels(folded_fn, folded), images, labels)
    assert accuracy > 90


@needs_data
def test_resnet20_top1_on_the_whole_test_set():
    images, labels = data.load_cifar10("test")
    folded = resnet_cifar.fold_batch_norm(resnet_cifar.load_pretrained(20))
    assert top1(predict_pixels(resnet_cifar.folded_apply_fn(20), folded), images, labels) == 91.73


@needs_data
def test_cifar10_training_set():
    images, labels = data.load_cifar10("train")
    assert images.shape == (50_000, 32, 32, 3)
    assert np.bincount(labels).tolist() == [5000] * 10
