"""The request filter: logins and rate limits."""

import os

from sft.web.security import Limits, is_login, network, read_logins


def test_a_password_may_hold_colons(monkeypatch):
    monkeypatch.setenv("WEB_DEMO_AUTH", "anna:a:b")
    assert read_logins("0.0.0.0", None) == {"anna": "a:b"}
    assert "WEB_DEMO_AUTH" not in os.environ


def test_a_file_may_hold_several_logins(tmp_path):
    (tmp_path / "logins").write_text("anna:a:b\n\nben:c\n")
    logins = read_logins("0.0.0.0", str(tmp_path / "logins"))
    assert logins == {"anna": "a:b", "ben": "c"}
    tries = (("anna", "a:b"), ("ben", "a:b"), ("carl", ""), ("carl", "c"), ("ben", "ü"))
    assert [is_login(logins, *pair) for pair in tries] == [True, False, False, False, False]


def test_requests_of_a_tab_and_of_an_address_are_counted():
    limits = Limits(per_minute=2)
    assert [limits.admit("a", "1.2.3.4") for _ in range(3)] == [True, True, False]
    assert limits.admit("b", "1.2.3.4")
    assert sum(limits.admit(f"tab {index}", "1.2.3.4") for index in range(40)) == 20 - 3
    assert limits.admit("c", "1.2.3.5")
    assert network("2001:db8::1") == network("2001:db8::ffff") != network("2001:db8:1::1")
