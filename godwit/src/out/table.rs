//! Aligned columns.

use comfy_table::{Table, presets};

use super::safe;

/// Rows under a heading, each cell made safe; ends with a line break. Empty cells show as `-`.
pub(crate) fn rows(heading: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = plain();
    table.set_header(heading);
    for row in rows {
        table.add_row(row.iter().map(|cell| cell_text(cell)));
    }
    finished(&table)
}

/// Facts about one thing, a line each.
pub(crate) fn facts(facts: &[(&str, String)]) -> String {
    let mut table = plain();
    for (name, value) in facts {
        table.add_row([format!("{name}:"), cell_text(value)]);
    }
    finished(&table)
}

fn cell_text(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        safe::text(text)
    }
}

fn plain() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    // Never cut to the terminal's width: what is copied from a table must be whole.
    table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
    table
}

fn finished(table: &Table) -> String {
    let lines = table.lines().map(|line| line.trim().to_owned() + "\n");
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_cells_neither_break_lines_nor_reach_the_terminal() {
        let row = vec!["a\nb".to_owned(), "\u{1b}[2J".to_owned(), String::new()];
        let text = rows(&["NAME", "STATE", "HOST"], [row]);
        assert_eq!(text, "NAME     STATE      HOST\na\\u{a}b  \\u{1b}[2J  -\n");
    }

    #[test]
    fn facts_are_aligned() {
        let text = facts(&[("name", "web1".to_owned()), ("generation", "3".to_owned())]);
        assert_eq!(text, "name:        web1\ngeneration:  3\n");
    }
}
