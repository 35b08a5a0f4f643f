"""`make test` keeps the tests of a file in one process, and those that measure time apart from each other."""

from __future__ import annotations

import pytest


def test_pytest_xdist_knows_the_group_of_each_test(request):
    # pytest 9.2 no longer lets pytest-xdist 3.8 add the group to a test's name: without an error, all are scattered
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("only with -n and --dist loadgroup")
    assert request.node.nodeid.endswith("@tests/common/test_grouping.py")
