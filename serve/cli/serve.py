"""``florence2 serve``: the whole app on this machine, with no platform and no credentials."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from florence2.errors import RequestError
from serve.cli.loading import fetch, first_and_others
from serve.cli.options import Device, Devices, ModelName, Precision, Runtime
from serve.console import say

DEFAULT_MODEL: Final = "demo"
_EXAMPLE_IMAGE: Final = "demo/images/scene_bike.png"
# What to open where a server listens on every address.
_LOOPBACK: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_BACKLOG: Final = 256
BROWSER_THREAD: Final = "browser"
# What says that there is a screen; without one a text browser would take the terminal.
_SCREENS: Final = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")

Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets the whole network in.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")]
MaxBatch = Annotated[
    int | None, typer.Option(min=1, help="Most prompts answered at once. [default: by device]")
]

Megapixels = Annotated[
    int | None,
    typer.Option(min=1, help="Megapixels of images open at once. [default: by memory]"),
]
HeldMib = Annotated[
    int | None, typer.Option(min=1, help="MiB of uploads held at once. [default: by memory]")
]

MaxQueued = Annotated[int, typer.Option(min=1, help="Prompts that may wait; then 503.")]

AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="A name of this server besides localhost; can be given more than once."),
]
AllowServer = Annotated[
    list[str] | None,
    typer.Option(
        help="A platform whose images requests may name, such as https://app.example.org."
    ),
]
AllowDeploy = Annotated[
    list[str] | None,
    typer.Option(help="A hub id or folder that requests may deploy, besides the published ones."),
]

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="A LoRA adapter of the model that requests may name (settings: {model: NAME}); can be "
        "given more than once.",
    ),
]
OpenPage = Annotated[
    bool, typer.Option("--open", help="Open the page in a browser; without one, only say where.")
]


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    model: ModelName = DEFAULT_MODEL,
    device: Device = "auto",
    devices: Devices = None,
    precision: Precision = "auto",
    runtime: Runtime = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: MaxBatch = None,
    max_queued: MaxQueued = 4096,
    allow_host: AllowHost = None,
    allow_server: AllowServer = None,
    allow_deploy: AllowDeploy = None,
    adapter: Adapters = None,
    open_megapixels: Megapixels = None,
    held_mib: HeldMib = None,
    open_page: OpenPage = False,
) -> None:
    """Serve a model over HTTP on this machine; Ctrl-C ends it."""
    with listening_socket(host, port) as listener:
        say(f"Loading {model} ...")
        from florence2.runtimes.device import choose_device
        from serve.sdk import sly

        # The SDK writes a line of JSON for every step, which is for the platform's log.
        sly.logger.setLevel("WARNING")
        first, others = first_and_others(device, devices)
        choose_device(first)
        adapters = named_adapters(adapter or ())
        from serve.http.guard import Callers
        from serve.http.json_bodies import Servers

        callers = Callers.from_environment(host, allow_host or ())
        servers = Servers.from_environment(allow_server or ())
        fetch(model)
        from serve.app import Florence2App, LocalServer

        _set_budgets(open_megapixels, held_mib)
        app = Florence2App(
            local=LocalServer(
                model,
                first,
                precision,
                runtime,
                max_batch,
                max_queued,
                listener,
                callers,
                servers,
                tuple(allow_deploy or ()),
                adapters,
                others,
            )
        )
        url = greet(host, listener.getsockname()[1], model)
        if open_page:
            # A browser may stay in front until it is closed; it waits for the server meanwhile.
            threading.Thread(
                target=show_page, args=(url,), name=BROWSER_THREAD, daemon=True
            ).start()
        app.serve()


def named_adapters(options: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The names and folders of ``--adapter`` options; RequestError for what is none."""
    found: dict[str, str] = {}
    for option in options:
        name, _, folder = (part.strip() for part in option.partition("="))
        if not name or not folder:
            raise RequestError(
                f"An adapter is given as NAME=DIR, and {option!r} was received; write for example "
                "--adapter cats=adapters/cats."
            )
        if name in found:
            raise RequestError(
                f"An adapter has a name of its own, and {name!r} stands for {found[name]} and for "
                f"{folder}; give one of them another name."
            )
        found[name] = folder
    return tuple(found.items())


def _set_budgets(open_megapixels: int | None, held_mib: int | None) -> None:
    from florence2.budget import open_pixels
    from serve.limits import MIB, held_bytes

    if open_megapixels is not None:
        open_pixels().capacity = open_megapixels * 10**6
    if held_mib is not None:
        held_bytes().capacity = held_mib * MIB


def listening_socket(host: str, port: int) -> socket.socket:
    """The socket to listen on, taken before a model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise RequestError(
            f"The app needs an address of its own, and {host}:{port} cannot be had "
            f"({os.strerror(error.errno or 0)}); name another --port."
        ) from error


def show_page(url: str) -> None:
    """Opens the page in a browser, or says where it is."""
    import webbrowser

    has_screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, _SCREENS))
    if not has_screen or not webbrowser.open(url):
        say(f"There is no browser to open here. The page: {url}")


def greet(host: str, port: int, model: str) -> str:
    """Says where the app answers, and how to ask; returns the address of the page."""
    name = _LOOPBACK.get(host, host)
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    say(f"{model} answers at {url}; open it in a browser, or ask:")
    # The examples come with the repository, not with an installed package.
    image = _EXAMPLE_IMAGE if Path(_EXAMPLE_IMAGE).is_file() else "image.jpg"
    say(
        f"  curl -s -F files=@{image} "
        f'-F \'settings={{"settings": {{"task_prompt": "<OD>"}}}}\' {url}/inference_image'
    )
    return url
