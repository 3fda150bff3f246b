import importlib.util

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.study.database import check_database, check_url, connect, join_address, split_address
from tests.support.postgres import PLAIN


@pytest.mark.parametrize(
    "url",
    ["postgresql:///studies", "postgresql://db.example/studies", "postgresql://me@[::1]:5432/my-studies"],
)
def test_address_of_a_study_holds_the_url_of_its_database(url):
    assert check_url(url) == url
    assert split_address(join_address(url, "first-0a1b2c3d")) == (url, "first-0a1b2c3d")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@db/studies",
        "postgresql://me:hun/ter2@db/studies",
        "postgresql://me:@db/studies",
        "postgresql://db/studies?password=hunter2",
    ],
)
def test_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"^postgresql://.*: contains a password, .*PGPASSWORD") as raised:
        check_url(url)
    assert "ter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://db/studies",
        "sqlite:///studies.db",
        "postgresql+psycopg2://db/studies",
        "postgresql://db",
        "postgresql://db/studies?service=other",
        "postgresql://db/{SCHEMA_VERSION}",
        "postgresql://db/studies#first",
        "first",
    ],
)
def test_what_is_no_plain_url_of_postgresql_is_refused(url):
    with pytest.raises(UserError, match=r"^expected postgresql://\[USER@\]HOST\[:PORT\]/DATABASE, without options"):
        check_url(url)


def test_database_that_cannot_be_opened_is_one_sentence(postgres):
    where = postgres.url("nowhere")
    with pytest.raises(UserError, match=r'nowhere: cannot be opened .*"nowhere" does not exist\); start the server'):
        connect(where)
    with pytest.raises(UserError, match=r"cannot be opened .*Connection refused"):
        connect("postgresql://127.0.0.1:1/studies")


def test_user_who_may_make_no_tables_is_told_so(postgres):
    url = postgres.new_database()
    check_database(url)
    postgres.execute("DO $$ BEGIN CREATE ROLE guest LOGIN; EXCEPTION WHEN duplicate_object THEN END $$")
    with pytest.raises(UserError, match="this user may not create tables; allow it"):
        check_database(url.replace("//emotion@", "//guest@"))


def test_server_that_asks_for_the_password_in_plain_text_does_not_get_it(postgres, monkeypatch):
    """A stranger's study.yaml may name a server of theirs."""
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    with pytest.raises(UserError, match="server requested a cleartext password"):
        connect(postgres.url(PLAIN))


def test_missing_extra_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"psycopg is missing; install it with pip install 'raytune_emotion\[postgres"):
        connect("postgresql://db/studies")
