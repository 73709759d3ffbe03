"""Seconds until the first call, each case in a new process."""

import json

import first_call


def test_a_case_is_measured_in_a_new_process(tmp_path, capsys):
    assert first_call.main(["--implementation", "xla", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    (row,) = content["rows"]
    assert row["case"] == "cpu_256"
    for program in ("first", "second"):
        stages = row[program]
        assert abs(sum(stages[stage] for stage in first_call.STAGES) - stages["all"]) < 0.05
        assert stages["compile"] > 0
    assert "cpu_256" in capsys.readouterr().out


def test_names_that_are_not_there_are_told(tmp_path, capsys):
    assert first_call.main(["--cases", "nothing", "--results", str(tmp_path)]) == 2
    assert "cpu_256" in capsys.readouterr().err
