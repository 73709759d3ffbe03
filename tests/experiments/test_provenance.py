"""The commit in a results file: that of the code that ran, or none."""

import importlib.util
import shutil
import subprocess

import provenance


def commit_of(file):
    spec = importlib.util.spec_from_file_location("copied_provenance", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.provenance()["commit"]


def test_a_copy_that_git_does_not_track_is_of_no_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "ignored").mkdir()
    (tmp_path / ".gitignore").write_text("ignored\n")
    tracked, copy = tmp_path / "provenance.py", tmp_path / "ignored" / "provenance.py"
    for place in (tracked, copy):
        shutil.copy(provenance.__file__, place)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    assert commit_of(tracked) == git("rev-parse", "HEAD")
    assert commit_of(copy) is None
    tracked.write_text(tracked.read_text() + "\n")
    assert commit_of(tracked) == git("rev-parse", "HEAD") + "+"
