import struct
import zlib

from raytune_emotion.data.affectnet import list_faces
from raytune_emotion.data.faces import native_size, sentences
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.storage.locations import Folder
from tests.support.faces import write_folder


def test_a_sentence_names_ten_files_and_counts_the_rest(tmp_path):
    write_folder(tmp_path, train=13)
    for annotation in (tmp_path / "train_set/annotations").iterdir():
        annotation.write_text("")
    faces = list_faces(Folder(tmp_path))
    (sentence,) = sentences(faces, faces.scan(EMOTIONS, map).faults, EMOTIONS)
    assert "empty annotation (13 files)" in sentence
    assert sentence.count("_prob_rank.txt") == 10
    assert sentence.endswith(", and 3 more")


def test_the_size_of_a_folder_is_that_of_the_pictures_that_can_be(tmp_path):
    write_folder(tmp_path)
    image = tmp_path / "train_set/images/0.png"
    whole = image.read_bytes()
    # The first chunk, behind the signature: length, name, width and height, five bytes more, checksum.
    header = whole[12:16] + struct.pack(">II", 60000, 60000) + whole[24:29]
    image.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    assert native_size(list_faces(Folder(tmp_path)), 224) == 20
