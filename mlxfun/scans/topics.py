"""Topics: a word or two about what an expert serves, from scans and from profiles of experts.

A domain scan says "Solidity" of the experts that it flags, a profile "numbers" of an expert that
serves them more than anything else (mlxfun.scans.token_classes). Both say nothing where the
evidence is weak. Topics know the state of the weights that they were found on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxfun.scans.reports import (
    DossierReport,
    Finding,
    ScanReport,
    Topic,
    TopicSource,
    TopicsReport,
)

MOST_WORDS = 2
OTHER_SIDE = {"domain": "general text", "safety": "benign prompts"}
"""What scans say of experts that work more on the second set."""


class TopicBook:
    """The topics of one resident model. A new finding takes the place of the same source's."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], dict[str, Topic]] = {}

    def note_scan(self, report: ScanReport) -> ScanReport:
        """Take up the experts that a scan flagged, in place of those of an earlier one of its name."""
        name = f"{report.technique} scan: {report.name}"
        for topics in self._found.values():
            topics.pop(name, None)
        source: TopicSource = "domain scan" if report.technique == "domain" else "safety scan"
        first = report.name if report.technique == "domain" else "harmful prompts"
        for row in report.rows:
            words = first if row.composite > 0 else OTHER_SIDE[report.technique]
            evidence = (
                f"{row.differential_freq:+.1%} of tokens compared with the other set "
                f"(q {row.q:.1g}, stability {row.stability:.2f})"
            )
            topic = Topic(
                row.layer, row.expert, words, source, evidence, row.q, report.state,
                abs(row.composite),
            )  # fmt: skip
            self._found.setdefault((row.layer, row.expert), {})[name] = topic
        return report

    def note_profile(self, layer: int, expert: int, found: Finding, state: str) -> None:
        """Take up what a profile found; nothing significant takes an earlier finding away."""
        topics = self._found.setdefault((layer, expert), {})
        topics.pop("profile", None)
        if found.words:
            topics["profile"] = Topic(
                layer, expert, found.words, "profile", found.evidence, found.q, state
            )

    def note_dossier(self, report: DossierReport, state: str) -> DossierReport:
        """Take up the profile of one expert."""
        why = report.why
        found = Finding(report.topic, report.topic_evidence, report.topic_q)
        self.note_profile(why.layer, why.expert, found, state)
        return report

    def __iter__(self) -> Iterator[Topic]:
        for cell in sorted(self._found):
            yield from self._found[cell].values()

    def words(self, state: str) -> dict[tuple[int, int], str]:
        """{(decoder layer, expert): its topics in words}; those of other weights say so."""
        found = ((cell, self.of(*cell, state=state)) for cell in self._found)
        return {cell: words for cell, words in found if words}

    def of(self, layer: int, expert: int, *, state: str) -> str:
        """The topics of one expert, the strongest scan first; "" without any."""
        topics = list(self._found.get((layer, expert), {}).values())
        here = [topic for topic in topics if topic.state == state]
        shown = _best(here or topics)
        return ", ".join(shown) + ("" if here or not shown else " (on other weights)")

    def report(self, state: str, experts: int) -> TopicsReport:
        """All of them."""
        rows = tuple(self)
        return TopicsReport(rows, experts, stale=sum(row.state != state for row in rows))


def _best(topics: Sequence[Topic]) -> list[str]:
    """The words of the strongest topics; the other side of a scan only where nothing else is known."""
    sides = set(OTHER_SIDE.values())
    ranked = sorted(topics, key=lambda t: (t.words in sides, t.source == "profile", -t.strength))
    words = list(dict.fromkeys(topic.words for topic in ranked))
    named = [one for one in words if one not in sides]
    return (named or words)[:MOST_WORDS]
