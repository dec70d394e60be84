"""The command in this process, and what it says when it fails."""

from __future__ import annotations

from privtuner import cli


def run(*line, **_):
    return cli.main([str(part) for part in line])


def flat(arguments, **changes):
    merged = {**arguments, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return [part for pair in merged.items() if pair[1] is not None for part in pair]


def failed(capsys, status, line):
    """Run, and return the single line it complains with."""
    try:
        found = run(*line)
    except SystemExit as stop:  # what argparse does
        found = stop.code
    out, err = capsys.readouterr()
    complaints = [entry for entry in err.splitlines() if entry.startswith("privtuner: error: ")]
    assert found == status, err
    assert out == ""
    assert len(complaints) == 1, err
    assert "Traceback" not in err
    return complaints[0]


def failed_late(capsys, status, line):
    """As `failed`, with lines of progress before."""
    assert run(*line) == status
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]
