"""A service that others could reach, without keys, does not start."""

import pytest


@pytest.mark.usefixtures("ray_serve")
def test_a_public_address_without_keys_is_refused(monkeypatch):
    from serve_app import app
    from serve_app.config import AppConfig

    assert app._bind_host() == "127.0.0.1"
    monkeypatch.setattr(app, "_bind_host", lambda: "0.0.0.0")
    with pytest.raises(app.UnsafeAddressError, match=r"http_options.host is 0\.0\.0\.0.*auth.keys_file"):
        app.build_app(AppConfig())
    said_so = AppConfig(auth={"allow_anonymous_on_public_address": True})
    assert app.build_app(said_so)
