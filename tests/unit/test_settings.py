"""Options from flags, variables, a file and their defaults; what is wrong with them is said in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shoal.kernel.files import Roots
from shoal.settings import OPTIONS, SettingsError, load_config, resolve

FIXTURES = Path(__file__).parent / "fixtures"
COLLECTORS = tuple(option.key.removeprefix("collector.") for option in OPTIONS if option.key.startswith("collector."))


def sentence(error: pytest.ExceptionInfo[SettingsError]) -> str:
    """Return what a person is told: one line that the command ends with a full stop."""
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def test_defaults() -> None:
    """Without any flag, variable or file all is as --help says, and every collector is on."""
    found = resolve({}, {})
    assert found.listen == ("127.0.0.1", 7462)
    assert found.roots == Roots()
    assert found.collectors == COLLECTORS
    assert found.collectors == tuple(sorted(found.collectors))
    assert {"conntrack", "listen_queue", "memory", "pressure"} <= set(found.collectors)
    assert (found.log_level, found.log_format) == ("info", "logfmt")


def test_every_option_has_a_variable_of_its_own() -> None:
    """No two share one, and none is a variable that Kubernetes makes for a service named shoal."""
    variables = [option.variable for option in OPTIONS]
    assert len(set(variables)) == len(variables)
    assert "SHOAL_WEB_LISTEN_ADDRESS" in variables
    assert "SHOAL_COLLECTOR_LISTEN_QUEUE" in variables
    assert not {name for name in variables if name.startswith(("SHOAL_PORT", "SHOAL_SERVICE"))}


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    """Each of the four is used where nothing before it says anything."""
    file = tmp_path / "shoal.yml"
    file.write_text("log: {level: debug, format: json}\ncollector: {memory: false, pressure: no}\n")
    flags = {"config.file": str(file), "log.level": "error"}
    environ = {"SHOAL_LOG_LEVEL": "warning", "SHOAL_COLLECTOR_PRESSURE": "true"}
    assert resolve(flags, environ).log_level == "error"
    assert resolve({"config.file": str(file)}, environ).log_level == "warning"
    found = resolve({}, {"SHOAL_CONFIG_FILE": str(file)})
    assert (found.log_level, found.log_format) == ("debug", "json")
    assert not {"memory", "pressure"} & set(found.collectors)
    found = resolve(flags, environ)
    assert "pressure" in found.collectors
    assert "memory" not in found.collectors
    assert found.listen == ("127.0.0.1", 7462)


def test_empty_variables_are_as_good_as_none() -> None:
    """Charts and unit files set variables to nothing."""
    assert resolve({}, dict.fromkeys((option.variable for option in OPTIONS), "")) == resolve({}, {})


def test_variables_that_kubernetes_sets_are_left_alone() -> None:
    """A service named shoal puts these into every pod of its namespace."""
    environ = {
        "SHOAL_PORT": "tcp://10.0.0.1:7462",
        "SHOAL_SERVICE_HOST": "10.0.0.1",
        "SHOAL_SERVICE_PORT": "7462",
        "SHOAL_SERVICE_PORT_METRICS": "7462",
        "SHOAL_PORT_7462_TCP": "tcp://10.0.0.1:7462",
        "SHOAL_PORT_7462_TCP_ADDR": "10.0.0.1",
        "SHOAL_PORT_7462_TCP_PORT": "7462",
        "SHOAL_PORT_7462_TCP_PROTO": "tcp",
        "SHOAL_WEB_PORT": "tcp://10.0.0.1:80",
        "SHOAL_LOG_SERVICE_HOST": "10.0.0.1",
    }
    assert resolve({}, environ) == resolve({}, {})


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":7462", ("", 7462)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("localhost:0", ("localhost", 0)),
        ("node-1.example_x:65535", ("node-1.example_x", 65535)),
        ("[::1]:7462", ("::1", 7462)),
        ("[::]:7462", ("::", 7462)),
        ("[fe80::1%eth0]:7462", ("fe80::1%eth0", 7462)),
        ("[::ffff:10.0.0.1]:1", ("::ffff:10.0.0.1", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    """Names, IPv4, IPv6 in brackets, and no host for all addresses."""
    assert resolve({"web.listen-address": text}, {}).listen == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7462",
        "127.0.0.1",
        "127.0.0.1:",
        ":",
        ":65536",
        ":99999999999999999999",
        ":-1",
        ":+1",
        ": 80",
        ":8o",
        ":٧٤٦٢",
        ":" + "9" * 5000,
        "::1:7462",
        "[::1]",
        "[::1:7462",
        "::1]:7462",
        "[localhost]:7462",
        "http://127.0.0.1:7462",
        "127.0.0.1:7462/metrics",
        "two words:7462",
        "host\n:7462",
        ":7462\n",
        "unix:/run/shoal.sock",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    """Each is refused with what would be right."""
    with pytest.raises(SettingsError) as error:
        resolve({"web.listen-address": text}, {})
    assert sentence(error) == (
        f"--web.listen-address is {text!r}, which is not host:port, "
        "such as 127.0.0.1:7462, [::1]:7462, or :7462 for all addresses"
    )


def test_directories(tmp_path: Path) -> None:
    """A proc is known by its file stat; trailing slashes do not matter; what is no directory is refused."""
    proc = FIXTURES / "6.1/proc"
    found = resolve({"path.procfs": f"{proc}//", "path.sysfs": f"{tmp_path}/", "path.rootfs": "//"}, {})
    assert found.roots == Roots(str(proc), str(tmp_path), "")
    (tmp_path / "stat").write_text("intr 1 2 3\n")
    (tmp_path / "fifo").mkdir()
    for key, text, problem in (
        ("path.procfs", "/nowhere", "a directory"),
        ("path.procfs", str(tmp_path), "a mounted proc file system (there is no proc's file stat in it)"),
        ("path.procfs", str(tmp_path / "fifo"), "a mounted proc file system (there is no proc's file stat in it)"),
        ("path.sysfs", "", "a directory"),
        ("path.sysfs", str(tmp_path / "stat"), "a directory"),
        ("path.rootfs", "", "a directory"),
        ("path.rootfs", "/" + "x" * 300, "a directory"),
        ("path.rootfs", "a\0b", "a directory"),
    ):
        with pytest.raises(SettingsError) as error:
            resolve({key: text}, {})
        assert sentence(error) == f"--{key} is {text!r}, which is not {problem}"


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ({"log.level": "loud"}, {}, "--log.level is 'loud', which is not one of debug, info, warning, error"),
        ({}, {"SHOAL_LOG_FORMAT": "xml"}, "SHOAL_LOG_FORMAT is 'xml', which is not one of logfmt, json"),
        ({}, {"SHOAL_COLLECTOR_MEMORY": "maybe"}, "SHOAL_COLLECTOR_MEMORY is 'maybe', which is not true or false"),
        (
            {f"collector.{name}": "false" for name in COLLECTORS},
            {},
            "every collector is switched off; leave at least one on",
        ),
    ],
)
def test_values_that_are_not_allowed(flags: dict[str, str], environ: dict[str, str], expected: str) -> None:
    """The sentence says where the value came from."""
    with pytest.raises(SettingsError) as error:
        resolve(flags, environ)
    assert sentence(error) == expected


@pytest.mark.parametrize("text", ["TRUE", "yes", "On", "1", "False", "no", "oFF", "0"])
def test_switches(text: str) -> None:
    """The words that YAML and shells know, in any case."""
    found = resolve({}, {"SHOAL_COLLECTOR_MEMORY": text, "SHOAL_LOG_LEVEL": "DEBUG"})
    assert ("memory" in found.collectors) is (text.lower() in {"true", "yes", "on", "1"})
    assert found.log_level == "debug"


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("---\n", {}),
        ("log.level: debug", {"log.level": "debug"}),
        ("log: {level: debug}\nlog.format: json", {"log.level": "debug", "log.format": "json"}),
        ("web: {listen-address: 0.0.0.0:7462}", {"web.listen-address": "0.0.0.0:7462"}),
        # Other YAML readers would make 4352 of it.
        ("web.listen-address: 1:12:32", {"web.listen-address": "1:12:32"}),
        ("collector: {memory: off, pressure: true}", {"collector.memory": "off", "collector.pressure": "true"}),
        ("\ufefflog.level: debug", {"log.level": "debug"}),
        ("a: &x debug\nlog.level: *x", None),
        ("log.level: !!python/object/apply:os.system [true]", None),
    ],
)
def test_files(content: str, values: dict[str, str] | None, tmp_path: Path) -> None:
    """Keys with dots or nested, values as the text that they are."""
    file = tmp_path / "shoal.yml"
    file.write_text(content, encoding="utf-8")
    if values is None:
        with pytest.raises(SettingsError):
            load_config(str(file))
    else:
        assert load_config(str(file)) == values


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"log.level: [debug]", ": log.level should hold one value"),
        (b"log: debug", ": log should have keys below it"),
        (b"log: [level, debug]", ": log should have keys below it"),
        (b"- log.level: debug", ": the file should hold keys and values, such as `log.level: debug`"),
        (b"debug", ": the file should hold keys and values, such as `log.level: debug`"),
        (b"log.levle: debug", ": there is no option log.levle; did you mean log.level?"),
        (b"log: {level: {debug: true}}", ": there is no option log.level.debug; did you mean log.level?"),
        (b"config.file: other.yml", ": there is no option config.file; did you mean web.config.file?"),
        (b"7462:", ": there is no option 7462; there are web.listen-address, web.config.file,"),
        (b"? [a, b]\n: c", ", line 1 is not YAML: found unhashable key"),
        (b"log: {level: debug}\nlog.level: info", ": log.level is given twice"),
        (b"log: &log\n  level: debug\n  log: *log", " is not YAML: found unconstructable recursive node"),
        (b"&a {log: *a}", " is not YAML: found unconstructable recursive node"),
        (b"&a [*a]", " is not YAML: found unconstructable recursive node"),
        (b"log.level: 'debug", ", line 1 is not YAML: found unexpected end of stream"),
        (b"log.level: debug\n\tlog.format: json", ", line 2 is not YAML: found character '\\t'"),
        (b"a: b: c", ", line 1 is not YAML: mapping values are not allowed here"),
        (b"log.level: debug\n---\nlog.level: info", ", line 2 is not YAML: but found another document"),
        (b"[" * 5000, " is nested too deeply"),
        (b"\xff\xfel\0o\0g\0", " is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\0\0\0", " is not YAML: special characters are not allowed"),
        (bytes(1000), " is not YAML: special characters are not allowed"),
    ],
)
def test_files_that_are_none(content: bytes, problem: str, tmp_path: Path) -> None:
    """Malformed, of another shape, with unknown keys, endless, binary: one sentence that names the file."""
    file = tmp_path / "shoal.yml"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as error:
        load_config(str(file))
    text = str(error.value)
    assert text.startswith("configuration file ")
    assert problem in text
    assert str(file) in text
    assert "\n" not in text


def test_a_wrong_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    """And one that a flag overrides does not matter."""
    file = tmp_path / "shoal.yml"
    file.write_text("log.level: loud")
    with pytest.raises(SettingsError) as error:
        resolve({"config.file": str(file)}, {})
    assert sentence(error) == f"log.level in {file} is 'loud', which is not one of debug, info, warning, error"
    assert resolve({"config.file": str(file), "log.level": "info"}, {}).log_level == "info"


@pytest.mark.parametrize("path", ["nowhere.yml", ".", "x" * 300 + ".yml"])
def test_a_file_that_cannot_be_read(path: str, tmp_path: Path) -> None:
    """Missing, a directory, a name that no file system takes."""
    with pytest.raises(SettingsError, match=r"^configuration file .* cannot be read: [A-Z][a-z ]+$"):
        resolve({"config.file": f"{tmp_path}/{path}"}, {})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary() | st.text("logeviwb.:-*&{}[]?!|>'\"#%@ \n\t0aé\x00", max_size=60).map(str.encode))
@example(content=b"log.level: 2001-99-99")
@example(content=b"log.level: !!int abc")
@example(content=b"log.level: !!timestamp x")
@example(content=b"log.level: !!bool x")
@example(content=b"log.level: !!binary '*'")
def test_no_file_raises_anything_else(content: bytes, tmp_path: Path) -> None:
    """Whatever the bytes: values that are text, or a `SettingsError` of one line."""
    file = tmp_path / "shoal.yml"
    file.write_bytes(content)
    try:
        values = load_config(str(file))
    except SettingsError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)
    else:
        assert all(isinstance(value, str) for value in values.values())
