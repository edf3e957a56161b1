//! `godwit audit`: who asked for what, from where, and what came of it.

use clap::{Args, Subcommand, ValueEnum};
use model::{AuditEntry, Timestamp, audit::AuditResult};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::Session;
use crate::{
    exit::Failure,
    out::{self, Format, safe, table, units},
};

/// Entries asked for at a time.
const PAGE_ITEMS: usize = 500;

/// What can be done with the audit log.
#[derive(Subcommand, Debug)]
pub(crate) enum Audit {
    /// List entries, the newest first
    List {
        #[command(flatten)]
        which: Which,
        /// At most this many
        #[arg(long, default_value_t = 50, value_name = "COUNT")]
        limit: usize,
    },
    /// Print all entries, the newest first, a line each
    Export {
        #[command(flatten)]
        which: Which,
        /// JSON objects, or comma-separated values with a heading
        #[arg(long, value_enum, default_value_t = Form::Jsonl, value_name = "FORMAT")]
        format: Form,
    },
}

/// Which entries. With --project, a cloud admin asks for that project's; else for all.
#[derive(Args, Debug)]
pub(crate) struct Which {
    /// Those of this subject: a user, or one of its tokens as USER/TOKEN
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// Those not before: 2026-11-20, or 2026-11-20T14:00:00Z
    #[arg(long, value_parser = moment, value_name = "TIME")]
    from: Option<Timestamp>,
    /// Those before
    #[arg(long, value_parser = moment, value_name = "TIME")]
    until: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    Jsonl,
    Csv,
}

/// A moment; a day alone is its beginning in UTC.
fn moment(text: &str) -> Result<Timestamp, String> {
    let whole = if text.len() == 10 {
        format!("{text}T00:00:00Z")
    } else {
        text.to_owned()
    };
    let moment = OffsetDateTime::parse(&whole, &Rfc3339);
    let moment = moment.map_err(|_| "give a time such as 2026-11-20 or 2026-11-20T14:00:00Z".to_owned())?;
    let ms = moment.unix_timestamp_nanos() / 1_000_000;
    i64::try_from(ms)
        .map(Timestamp)
        .map_err(|_| "the time is too far away".to_owned())
}

impl Which {
    fn query(&self, session: &Session) -> String {
        let mut query = String::new();
        let mut add = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                query.push_str(&format!("&{name}={}", encoded(&value)));
            }
        };
        add("subject", self.subject.clone());
        add(
            "project",
            session.client.server().project.as_ref().map(ToString::to_string),
        );
        add("from", self.from.map(|at| at.0.to_string()));
        add("until", self.until.map(|at| at.0.to_string()));
        query
    }
}

/// A value as a query takes it (RFC 3986, 2.1).
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

impl Audit {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { which, limit } => {
                let mut items = Vec::new();
                pages(session, &which, limit, |page| {
                    items.extend(page);
                    Ok(())
                })
                .await?;
                if session.format.is_data() {
                    return out::data(session.format, &items);
                }
                let wide = session.format == Format::Wide;
                let rows = items.iter().map(|item| Ok(row(out::read(item)?, wide)));
                let rows = rows.collect::<Result<Vec<_>, Failure>>()?;
                let heading: &[&str] = if wide { &WIDE } else { &WIDE[..6] };
                out::text(&table::rows(heading, rows))
            }
            Self::Export { which, format } => {
                if format == Form::Csv {
                    out::line(&COLUMNS.join(","))?;
                }
                pages(session, &which, usize::MAX, |page| {
                    let lines = page.iter().map(|item| match format {
                        Form::Jsonl => Ok(safe::json(&item.to_string())),
                        Form::Csv => Ok(csv(&out::read(item)?)),
                    });
                    let lines = lines.collect::<Result<Vec<String>, Failure>>()?;
                    lines.iter().try_for_each(|line| out::line(line))
                })
                .await
            }
        }
    }
}

/// Takes entries page by page: an export may be larger than memory.
async fn pages(
    session: &Session,
    which: &Which,
    most: usize,
    mut take: impl FnMut(Vec<Value>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let query = which.query(session);
    let (mut after, mut left) = (String::new(), most);
    while left > 0 {
        let limit = PAGE_ITEMS.min(left);
        let mut page = session
            .client
            .get(&format!("/v1/audit?limit={limit}{after}{query}"))
            .await?;
        if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
            left = left.saturating_sub(items.len());
            take(items)?;
        }
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => return Ok(()),
        }
    }
    Ok(())
}

const WIDE: [&str; 10] = [
    "TIME",
    "SUBJECT",
    "FROM",
    "ACTION",
    "TARGET",
    "RESULT",
    "PROJECT",
    "OPERATION",
    "TOKEN",
    "ID",
];

/// The columns of an export.
const COLUMNS: [&str; 12] = [
    "id", "time", "at_ms", "subject", "user", "token", "project", "remote", "action", "target", "result", "detail",
];

fn text(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// The result, and the refusal's code or the operation.
fn result(entry: &AuditEntry) -> (&'static str, String) {
    match &entry.result {
        AuditResult::Accepted { operation } => ("accepted", text(operation.as_ref())),
        AuditResult::Refused { code } => {
            let code = serde_json::to_value(code).unwrap_or_default();
            ("refused", code.as_str().unwrap_or_default().to_owned())
        }
    }
}

fn row(entry: AuditEntry, wide: bool) -> Vec<String> {
    let (word, detail) = result(&entry);
    let refused = matches!(entry.result, AuditResult::Refused { .. });
    let mut row = vec![
        units::show_time(entry.at),
        entry.subject.clone(),
        text(entry.remote),
        entry.action.clone(),
        entry.target.clone(),
        if refused {
            format!("{word}: {detail}")
        } else {
            word.to_owned()
        },
    ];
    if wide {
        let operation = if refused { String::new() } else { detail };
        row.extend([text(entry.project), operation, text(entry.token), entry.id.to_string()]);
    }
    row
}

/// A line as RFC 4180 has it, every value quoted.
fn csv(entry: &AuditEntry) -> String {
    let (word, detail) = result(entry);
    let values = [
        entry.id.to_string(),
        units::show_time(entry.at),
        entry.at.0.to_string(),
        entry.subject.clone(),
        text(entry.user),
        text(entry.token),
        text(entry.project),
        text(entry.remote),
        entry.action.clone(),
        entry.target.clone(),
        word.to_owned(),
        detail,
    ];
    let quoted = values.map(|value| format!("\"{}\"", safe::text(&value).replace('"', "\"\"")));
    quoted.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_queries_are_read_as_they_are_meant() {
        assert_eq!(moment("1970-01-02").unwrap(), Timestamp(86_400_000));
        assert_eq!(moment("1970-01-01T00:00:01+00:00").unwrap(), Timestamp(1000));
        assert!(moment("yesterday").is_err() && moment("2026-13-01").is_err());
        assert_eq!(encoded("alice/ci &x=1"), "alice%2Fci%20%26x%3D1");
    }

    #[test]
    fn a_line_of_an_export_has_every_column_and_breaks_no_line() {
        let entry = AuditEntry {
            id: model::AuditId(uuid::Uuid::nil()),
            at: Timestamp(0),
            subject: "a\"b\nc".to_owned(),
            user: None,
            token: None,
            project: None,
            remote: Some("192.0.2.1".parse().unwrap()),
            action: "session.login".to_owned(),
            target: "a,b".to_owned(),
            result: AuditResult::Refused {
                code: model::Code::Unauthenticated,
            },
        };
        let line = csv(&entry);
        assert!(line.contains("\"a\"\"b\\u{a}c\"") && !line.contains('\n'), "{line}");
        assert!(
            line.ends_with("\"session.login\",\"a,b\",\"refused\",\"unauthenticated\""),
            "{line}"
        );
        assert_eq!(line.matches("\",\"").count() + 1, COLUMNS.len());
    }
}
