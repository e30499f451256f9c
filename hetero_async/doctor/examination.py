"""All that is looked at on one host; which of it, follows from run.toml and the keys that lie here."""

from collections.abc import AsyncIterator

from hetero_async.asking import nodes_here
from hetero_async.config import RunConfig
from hetero_async.core.records import RunSettings
from hetero_async.doctor import host, network, papers, places
from hetero_async.doctor.findings import Finding
from hetero_async.watch.plan import server_disk_bytes, server_memory_bytes, worker_memory_bytes
from hetero_async.watch.timing import Question, Site


def role(config: RunConfig) -> str:
    """For people: what this host is to the run."""
    nodes = [node.name for node in nodes_here(config)]
    sites = dict.fromkeys(site for site, worker in config.workers() if worker in papers.names_here(config))
    parts = [f"node {name}" for name in nodes] + [f"site {site}" for site in sites]
    return ", ".join(parts) or "no part of the run"


async def examine(config: RunConfig, parameters: float) -> AsyncIterator[Finding]:
    """One after another, so that none disturbs another's measure. `parameters`: of the model, 0 where nobody knows."""
    nodes, names = nodes_here(config), papers.names_here(config)
    workers = [worker for _, worker in config.workers() if worker in names]
    question = _question(config, parameters or max((places.parameters_of(config, node) for node in nodes), default=0))
    needed = server_memory_bytes(question) if nodes and question else 0
    needed += len(workers) * worker_memory_bytes(question) if question else 0
    for findings in (
        host.versions(),
        host.files(len(config.workers()) if nodes else len(workers)),
        host.memory(needed, "this host's part"),
        host.clock(),
        host.arithmetic(),
        papers.keys(config, [node.name for node in nodes]),
    ):
        for finding in findings:
            yield finding
    states = await network.running(nodes)
    for node in nodes:
        disk = server_disk_bytes(question, len(config.workers())) if question else 0
        for finding in places.place(node.name, node.directory, disk):
            yield finding
        for finding in network.ports(node, states):
            yield finding
    for worker in workers[:1]:  # they share one disk
        for finding in places.place("workers", config.worker_directory(worker).parent, 0):
            yield finding
    async for finding in _beyond(config, [node.name for node in nodes], states, names):
        yield finding
    if workers:
        for finding in host.devices():
            yield finding


async def _beyond(
    config: RunConfig, here: list[str], states: dict[str, str], names: list[str]
) -> AsyncIterator[Finding]:
    workers = [worker for _, worker in config.workers() if worker in names]
    asking = workers or [name for name in names if name in here] or names
    # A site on a server's own host reaches it as any other does, while it runs.
    for other in network.others(config, [name for name in here if not workers or name not in states]):
        if isinstance(other, Finding):
            yield other
            continue
        async for finding in network.link(config, other, asking):
            yield finding
    if here:
        async for finding in network.witness(config):
            yield finding
        async for finding in network.archive(config):
            yield finding


def _question(config: RunConfig, parameters: float) -> Question | None:
    """What this host needs depends on the model and on how many work, and on nobody's speed."""
    count = max(1, len(config.workers()))
    if not parameters:
        return None
    site = Site(name="all", workers=count, step_seconds=1.0)
    settings = RunSettings(run=config.run.name, **config.training.model_dump())
    return Question(
        parameters=parameters, sites=(site,), settings=settings, checkpoint_every=config.server.checkpoint_every
    )
