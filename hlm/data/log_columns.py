"""Which column of a raw table is what: by the names that shops give them, and by what the user says.

A guess is certain where one column alone has a name of a role. What is not certain is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from hlm.data.log_sources import RawTable
from hlm.errors import HlmError
from hlm.settings import closest

# Role -> names, folded to small letters and underscores. The first is the contract's own: where a column has it, no
# other is looked at.
_ID = "_id id sku asin product_id item_id ad_id doc_id document_id article_id article_number article_no product_number "
_ID += "item_number corpus_id object_id event_attributes_object_object_id gtin ean artikelnummer offer_id"
_QUERY = "query user_query search_term search_query searchterm search_phrase search_text keyword keywords q term text "
_QUERY += "search search_string query_text suchbegriff event_attributes_query"
_USER = (
    "user user_id userid client_id visitor_id visitor customer_id session session_id sessionid anon_id anonymous_id "
)
_USER += "cookie_id device_id uid ip"
_TIME = "time timestamp date datetime day created_at event_time query_time ts datum search_date"
_NAMES = {
    "catalogue": {
        "_id": _ID,
        "title": "title name product_name product_title item_name headline ad_title titel bezeichnung",
        "text": "text description desc body product_description long_description ad_text beschreibung content summary",
        "keywords": "keywords bid_keywords bid_keyword keyword bidwords",
        "exact": "exact exact_keywords exact_match",
        "phrase": "phrase phrase_keywords phrase_match",
        "broad": "broad broad_keywords broad_match",
        "negative": "negative negative_keywords negatives negative_match",
    },
    "log": {
        "query": _QUERY,
        "count": "count frequency freq searches search_count query_count num_searches hits volume search_volume anzahl",
        "user": _USER,
        "time": _TIME,
        "agent": "agent user_agent useragent",
        "query_id": "query_id",
        "action": "action action_name",
    },
    "clicks": {
        "query": _QUERY,
        "_id": _ID,
        "clicks": "clicks click clicked click_count num_clicks is_click klicks",
        "impressions": "impressions impression views shown impr num_impressions impression_count",
        "conversions": "conversions conversion purchases purchase orders purchased converted sales num_orders "
        "transactions add_to_cart",
        "position": "position pos rank ordinal event_attributes_position_ordinal slot",
        "user": _USER,
        "time": _TIME,
        "query_id": "query_id search_id",
        "action": "action action_name event event_type event_name type",
    },
    "judgements": {
        "query": _QUERY,
        "_id": _ID,
        "grade": "grade score relevance rating judgement judgment label rel relevance_grade",
    },
}
NEEDED = {  # one of each
    "catalogue": (("_id",), ("title", "text")),
    "log": (("query",),),
    "clicks": (("query", "query_id"), ("_id",)),
    "judgements": (("query",), ("_id",), ("grade",)),
}

Columns = dict[str, str]  # role -> column


def _folded(name: str) -> str:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_") or name.lower()


def given_columns(words: Sequence[str]) -> dict[str, dict[str, str]]:
    """{table or "": {role: column}} of `title=name,_id=sku` and `log.query=term`.

    Raises:
        HlmError: another form, an unknown table or role, or a role given twice.
    """
    found: dict[str, dict[str, str]] = {}
    for word in (part for words_ in words for part in words_.split(",") if part.strip()):
        place, equals, column = word.partition("=")
        table, dot, role = place.strip().rpartition(".")
        if not equals or not column.strip():
            raise HlmError(f"columns: expected role=column, found '{word}'; for example --columns title=name,_id=sku")
        if dot and table not in _NAMES:
            raise HlmError(f"columns: expected a table of {', '.join(_NAMES)}, found '{table}' in '{word}'; correct it")
        roles = list(_NAMES[table]) if dot else list(dict.fromkeys(role for roles in _NAMES.values() for role in roles))
        if role not in roles:
            raise HlmError(
                f"columns: expected a role of {', '.join(roles)}, found '{role}' in '{word}'{closest(role, roles)}"
            )
        if found.setdefault(table, {}).setdefault(role, column.strip()) != column.strip():
            raise HlmError(f"columns: expected one column for '{role}', found two; for one table: --columns log.{word}")
    return found


def chosen(table: RawTable, said: Mapping[str, Mapping[str, str]]) -> Columns:
    """Role -> column of a table: what was said, else what its names tell.

    Raises:
        HlmError: a column that is not there, one that no name tells, or that several names tell; it lists the columns.
    """
    roles, columns = _NAMES[table.what], table.columns
    own = dict(said.get(table.what, {}))
    own = {role: column for role, column in said.get("", {}).items() if role in roles and column in columns} | own
    for role, column in own.items():
        if column not in columns:
            raise HlmError(
                f"columns: expected '{column}' ({role}) among the columns of {table.name}, found {_listed(columns)}"
                f"{closest(column, columns)}"
            )
    found, unsure = dict(own), {}
    needed = {role for group in NEEDED[table.what] for role in group}
    for role, names in roles.items():
        named = names.split()
        free = [column for column in columns if column not in found.values()]
        fit = [column for column in free if column == named[0]] or [
            column for column in free if _folded(column) in {_folded(name) for name in named}
        ]
        if role in own or not fit:
            continue
        if len(fit) > 1 and role in needed:
            unsure[role] = fit
        elif len(fit) == 1 or role not in needed:
            # Of further ones the better name: a user is better than a session.
            order = [_folded(name) for name in named]
            found[role] = min(fit, key=lambda column: order.index(_folded(column)))
    _check(table, found, unsure)
    return found


def _check(table: RawTable, found: Columns, unsure: Mapping[str, Sequence[str]]) -> None:
    columns = _listed(table.columns)
    for role, fit in unsure.items():
        raise HlmError(
            f"{table.what}: expected one column of {table.name} to be '{role}', found {' and '.join(fit)}; choose with "
            f"--columns {table.what}.{role}={fit[0]}"
        )
    for group in NEEDED[table.what]:
        if not any(role in found for role in group):
            raise HlmError(
                f"{table.what}: expected a column for {' or '.join(group)} in {table.name}, found {columns}; name it "
                f"with --columns {table.what}.{group[0]}=COLUMN, or add the header line if the file has none"
            )


def confirm_columns(
    choices: Sequence[tuple[RawTable, Columns]], ask: Callable[[str], str] | None, say: Callable[[str], None]
) -> None:
    """Says what was chosen, and asks whether it is right where somebody can answer.

    Args:
        ask: as `input`; None: nobody is asked.

    Raises:
        HlmError: it is not right.
    """
    for table, columns in choices:
        left = [column for column in table.columns if column not in columns.values()]
        say(f"{table.what} {table.name}: " + ", ".join(f"{role}={column}" for role, column in columns.items()))
        if left:
            say(f"  not read: {_listed(left)}")
    if ask is not None and ask("Go on with these columns? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        raise HlmError("columns: expected the right ones, found that they are not; say --columns role=column,...")


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns[:12]) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")
