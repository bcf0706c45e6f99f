import json

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from results.measure import measure_prepare, tables


def test_a_small_measurement_has_all_figures(tmp_path):
    settings = {"dirty": [20_000], "long": [], "ads": 300, "planted": 200, "product_numbers": 1000}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings | {"output": str(tmp_path / "prepare.json")}))
    measure_prepare.main(["--config", str(tmp_path / "small.yaml")])
    found = json.loads((tmp_path / "prepare.json").read_text())
    (run,) = found["runs"]
    assert run["planted"] == 200 and run["planted_found"] == 0 and run["dropped"]["log"]["e-mail"] > 0
    assert found["product_numbers"] == {"of": 1000, "lost": 0} and run["peak_mib"] > 50 and run["seconds"] > 0
    assert "| 20,000 |" in tables.prepared(found) and "0 of 200" in tables.prepared(found)


def test_every_second_line_of_a_long_log_is_its_own(tmp_path):
    queries = pq.read_table(measure_prepare.long_log(tmp_path, 2000))["query"].to_pylist()
    assert len(queries) == 2000 and 1000 < len(set(queries)) <= 1200


def test_what_was_planted_is_found_where_it_is(tmp_path):
    for kind in ("txt", "html"):
        (tmp_path / f"report.{kind}").write_text("lamp")
    pq.write_table(pa.table({"text": ["red lamp", "4111111111111111"]}), tmp_path / "queries.parquet")
    pq.write_table(pa.table({"text": ["Jane@Example.org"]}), tmp_path / "unlabelled.parquet")
    planted = ["4111 1111 1111 1111", "jane@example.org", "john@example.org", "0171 1234567"]
    assert measure_prepare.found_in(tmp_path, planted) == 2
