"""Publishes a run on the Hub: its student, teacher's adapter, dataset with vectors and index, and the demo.

    python recipes/publish.py --config recipes/configs/quickstart/publish.yaml --namespace NAME --dry-run

Without --dry-run it does what that printed, with the token of `hf auth login` or HF_TOKEN. Everything is checked before
anything is sent; each repository changes in one commit; what points to others comes after them, tags last. The same run
published twice changes nothing, and after a failure the same command completes it. What others added on the Hub stays,
what they edited there is not overwritten: --delete_others and --overwrite_edited do so.
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.publishing.publish import Published
from hlm.publishing.release import Release, publish
from hlm.steps import PublishConfig


def main(argv: Sequence[str] | None = None) -> dict[str, Published]:
    settings = given(PublishConfig, argv=argv)
    release = publish(**settings)
    if settings.get("dry_run"):
        print_plan(release.repositories)
    else:
        print_table(release, settings.get("tag"))
    return release.repositories


def print_plan(planned: dict[str, Published]) -> None:
    for one in planned.values():
        print(f"\n{one.repo_type} {one.repo_id}")
        for name, size in one.files.items():
            print(f"{size:>15,}  {name}")
        print(f"{sum(one.files.values()):>15,}  bytes in {len(one.files)} files")
        print(f"\n--- README.md ---\n{one.card}\n--- end ---")
    print("\nWhat would change on the Hub")
    for one in planned.values():
        print(f"{one.repo_type} {one.repo_id}")
        for line in one.changes.lines() if one.changes else [f"not compared with the Hub: {one.not_compared}"]:
            print(f"  {line}")
    print("dry run: nothing was sent")


def print_table(release: Release, tag: str | None) -> None:
    print(f"\n{'repository':<50} {'commit':<13} {'files':>5} {'bytes':>15}")
    for one in release.repositories.values():
        state = "" if one.changed else "  unchanged"
        size, commit = sum(one.files.values()), (one.commit or "")[:12]
        print(f"{one.repo_type + ' ' + one.repo_id:<50} {commit:<13} {len(one.files):>5} {size:>15,}{state}")
        for line in one.changes.lines() if one.changes and (one.changes.any or one.changes.kept) else ():
            print(f"  {line}")
    print(f"collection {release.collection}" + (f", tag {tag}" if tag else ""))


if __name__ == "__main__":
    run_recipe(main)
