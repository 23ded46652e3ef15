"""The README's example runs as it stands, on a tiny model."""

import re
from pathlib import Path

from tests.tiny_tokenizer import save_tiny_model

README = Path(__file__).parents[2] / "README.md"


def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    save_tiny_model(tmp_path / "model", "bert")
    words = ("good", "fine"), ("bad", "poor")
    rows = [
        f'{{"text": "{words[i % 2][i % 3 % 2]} thing", "label": {1 - i % 2}}}' for i in range(60)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    block = re.search(
        r"<!-- test: readme -->\n```python\n(.*?)```", README.read_text("utf-8"), re.S
    )
    code = block[1].replace('budget="1%"', 'budget="20%"')  # the tiny model has few parameters
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert ":lora" in printed
    assert len(re.findall(r"^(?!$|<)", code, re.M)) <= 10
    assert type(scope["model"].peft_config["default"]).__name__ == "LoraConfig"
    assert (tmp_path / "runs/mine/report/report.html").is_file()
