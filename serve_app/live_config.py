"""What a running service takes over without a restart: the `user_config` of its deployments, on top of its args."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from serve_app.config import LIVE, AppConfig, nearest
from serve_app.environment import EnvironmentVariableError, apply_environment


class InvalidUserConfigError(ValueError):
    """A user_config that cannot be taken over. The message names the key."""


class LiveConfig:
    """The configuration of a process: args, user_config over them, KRONOS_* variables over both."""

    def __init__(self, args: AppConfig, environ: Mapping[str, str]) -> None:
        """environ: the variables of where the application was built.

        Raises serve_app.environment.EnvironmentVariableError.
        """
        self._args = args
        self._environ = {name: value for name, value in environ.items() if name.startswith("KRONOS_")}
        self.current, self.warnings = apply_environment(args, self._environ)

    def update(self, user_config: Mapping[str, Any]) -> AppConfig:
        """The new current configuration. Each key replaces that key of args; an absent one means args again.

        Raises InvalidUserConfigError, and then nothing has changed.
        """
        for key in user_config:
            if key not in LIVE:
                hint = nearest(str(key), list(LIVE))
                raise InvalidUserConfigError(f"user_config: {key!r} cannot change without a restart{hint}")
        try:
            config = AppConfig.model_validate({**self._args.model_dump(), **user_config})
            self.current, self.warnings = apply_environment(config, self._environ)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise InvalidUserConfigError(f"user_config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except EnvironmentVariableError as error:
            raise InvalidUserConfigError(f"user_config: {error}") from None
        return self.current
