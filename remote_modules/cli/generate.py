"""``remote-modules generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from remote_modules.cli import output
from remote_modules.cli.options import (
    CacheDirOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    MdnsOption,
    ModelArgument,
    PeersOption,
    RevisionOption,
    SeedOption,
    Sources,
    TemperatureOption,
    TokenOption,
    TopPOption,
    TrackersOption,
    WaitOption,
)

if TYPE_CHECKING:
    from remote_modules.cli.text import Sampling, Source

__all__ = ["generate"]


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from.")],
    max_new_tokens: MaxNewTokensOption = 40,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    trackers: TrackersOption = None,
    peers: PeersOption = None,
    mdns: MdnsOption = True,
    wait_s: WaitOption = 5.0,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on from a prompt, by the peers of a swarm. The text goes to stdout, all else to stderr."""
    output.quiet_transformers()
    from remote_modules.cli.text import Sampling, Source

    if not prompt:
        raise ValueError("the prompt is empty; give some text to go on from")
    source = Source.with_hub(
        model=model,
        sources=Sources.of(trackers, peers, mdns),
        dtype=dtype,
        wait_s=wait_s,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
    )
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    _generate(source, sampling, prompt, as_json=as_json)


def _generate(source: Source, sampling: Sampling, prompt: str, *, as_json: bool) -> None:
    from remote_modules.cli.text import StopWatch, TextModel, summary_rows

    with TextModel.open(source) as text:
        ids = text.tokenizer(prompt)["input_ids"]
        if not as_json:
            output.err.print(prompt, style="dim", markup=False, end="", soft_wrap=True)
        watch = StopWatch()
        new = text.generate(ids, sampling, watch=watch, write=(lambda part: None) if as_json else output.stream)
        output.end_line()
        stats = text.stats()
        if not as_json:
            output.err.print()
            output.err.print(output.fields_table(summary_rows(stats, watch)))
            return
        output.print_json(
            {
                "model": source.model,
                "prompt": prompt,
                "text": text.decode(new),
                "token_ids": new,
                "num_tokens": len(new),
                "seconds": round(watch.total_s, 4),
                "first_token_seconds": round(watch.first_token_s, 4),
                "tokens_per_s": round(watch.tokens_per_s, 2),
                "route": output.describe_route(stats.route),
                "failovers": stats.failovers,
                "replayed_tokens": stats.replayed_tokens,
                "stall_seconds": round(stats.stall_seconds, 4),
            }
        )
