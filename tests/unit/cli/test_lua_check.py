"""The Lua compile check finds what it is for."""

from __future__ import annotations

from tools.lua_check import ROOT, compile_error, sources


def test_a_syntax_error_is_found_with_its_line() -> None:
    assert compile_error("x.lua", "local a = 1\nreturn a +") is not None
    assert "x.lua:2" in str(compile_error("x.lua", "local a = 1\nreturn a + end"))


def test_what_lua_5_1_does_not_have_is_found() -> None:
    assert compile_error("x.lua", "goto done ::done::") is not None
    assert compile_error("x.lua", "return 7 // 2") is not None


def test_every_script_of_the_project_compiles() -> None:
    found = sources(ROOT / "lua")
    assert "admit.lua" in found
    assert [error for name, text in found.items() if (error := compile_error(name, text))] == []
