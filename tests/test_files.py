import pytest

from raytune_emotion.files import whole, write_text


def test_a_file_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")

    def write_half() -> None:
        with whole(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_file_is_as_open_as_its_folder_whoever_wrote_it(tmp_path):
    tmp_path.chmod(0o750)
    with whole(tmp_path / "weights") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640
