"""Text from a stock transformers model whose blocks run on peers.

    python examples/generate.py [--prompt TEXT] [--tokens N] [--model MODEL --tracker URL]

Without --tracker it starts a tracker and three peers of the built-in model on this machine.
"""

import argparse
import contextlib

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from remote_modules import ClientConfig, RemoteSequential
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

ALONE = ClientConfig(peer_cache=None)  # no peers of other swarms that this machine remembers


def generate(model_name: str, trackers: list[str], config: ClientConfig, prompt: str, num_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    layers = RemoteSequential.from_swarm(model, trackers=trackers, mdns=False, config=config)
    model.model.layers = layers  # the one line: from here on, all blocks run in the swarm

    inputs = tokenizer(prompt, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, streamer=TextStreamer(tokenizer))

    stats = layers.stats()
    print(f"{stats.steps} passes over", " => ".join(f"{hop.span} {hop.peer_id[:6]}" for hop in stats.route))
    layers.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="text from a swarm")
    parser.add_argument("--prompt", default="The function returns a")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--model", default=str(built_in_path()))
    parser.add_argument("--tracker")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.tracker is None:
            swarm = stack.enter_context(LocalSwarm(options.model, spans=["0:3", "3:6", "6:8"]))
            trackers, config = swarm.trackers, ALONE
        else:
            trackers, config = [options.tracker], ClientConfig()
        generate(options.model, trackers, config, options.prompt, options.tokens)


if __name__ == "__main__":
    main()
