//! Foreign text made safe for a terminal: nothing in it moves the cursor, changes colours or turns the direction of reading.

use serde_json::Value;

/// Characters that a terminal obeys instead of showing, and those that reorder what is shown (Unicode TR 9, TR 36).
fn is_active(c: char) -> bool {
    let reorders = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let breaks = matches!(c, '\u{2028}' | '\u{2029}');
    c.is_control() || reorders || breaks
}

/// One line, with active characters as `\u{1b}`.
pub(crate) fn text(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_active(c) {
            safe.extend(c.escape_unicode());
        } else {
            safe.push(c);
        }
    }
    safe
}

/// JSON text that means the same: its strings may hold active characters, escaped as JSON has it.
pub(crate) fn json(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        // Line breaks are the printer's own; in strings they are escaped already.
        if is_active(c) && c != '\n' {
            safe += &format!("\\u{:04x}", u32::from(c));
        } else {
            safe.push(c);
        }
    }
    safe
}

/// A value whose strings show their active characters, for forms that have no escape for all of them. Line breaks stay.
pub(crate) fn value(value: &Value) -> Value {
    match value {
        Value::String(string) => Value::String(string.split('\n').map(text).collect::<Vec<_>>().join("\n")),
        Value::Array(items) => Value::Array(items.iter().map(self::value).collect()),
        Value::Object(fields) => Value::Object(
            fields
                .iter()
                .map(|(name, field)| (text(name), self::value(field)))
                .collect(),
        ),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        assert_eq!(text("plain, äöü, 東京"), "plain, äöü, 東京");
        assert_eq!(text("\u{1b}]0;x\u{7}\r\n"), "\\u{1b}]0;x\\u{7}\\u{d}\\u{a}");
        assert_eq!(text("\u{202e}txt"), "\\u{202e}txt");
        assert_eq!(text("\u{9b}2J"), "\\u{9b}2J");
    }
}
