//! `godwit op`: operations, under way or over.

use clap::Subcommand;
use clap_complete::ArgValueCompleter;
use model::{OperationId, operation::OperationState, query::OperationView};
use serde_json::json;

use super::{Heading, Session, completion, host::said};
use crate::{
    exit::Failure,
    follow::{Wait, follow},
    out::{self, live, receipt, table, units},
};

/// What can be done with operations.
#[derive(Subcommand, Debug)]
pub(crate) enum Op {
    /// List operations, the newest first
    List {
        /// At most this many
        #[arg(long, default_value_t = 50, value_name = "COUNT")]
        limit: u16,
    },
    /// Show an operation
    Show {
        /// Its id
        #[arg(add = ArgValueCompleter::new(completion::operations))]
        operation: OperationId,
    },
    /// Wait for the end of an operation; fails if it does
    Wait {
        /// Its id
        #[arg(add = ArgValueCompleter::new(completion::running))]
        operation: OperationId,
        /// Wait at most this long, then end with exit code 6
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Give an operation up
    Cancel {
        /// Its id
        #[arg(add = ArgValueCompleter::new(completion::running))]
        operation: OperationId,
    },
}

impl Op {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List { limit } => {
                session
                    .list("/v1/operations", Some(usize::from(limit.max(1))), HEADING, row)
                    .await
            }
            Self::Show { operation } => session.show(&format!("/v1/operations/{operation}"), facts).await,
            Self::Wait { operation, timeout } => {
                let answer = session.client.get(&format!("/v1/operations/{operation}")).await?;
                let followed = follow(&session.client, session.format, answer, Wait::at_most(timeout)).await?;
                if session.format.is_data() {
                    return Ok(());
                }
                out::text(&facts(followed.view))
            }
            Self::Cancel { operation } => {
                session
                    .client
                    .post(&format!("/v1/operations/{operation}/cancel"), &json!({}))
                    .await?;
                let answer = session.client.get(&format!("/v1/operations/{operation}")).await?;
                if session.format.is_data() {
                    return out::data(session.format, &answer);
                }
                said(session, true, &format!("operation {operation} is told to end"))
            }
        }
    }
}

const HEADING: Heading = Heading {
    narrow: &["ID", "KIND", "TARGET", "STATE", "CREATED", "PROGRESS"],
    wide: &["BY", "FINISHED"],
};

fn row(view: OperationView, wide: bool) -> Vec<String> {
    let operation = &view.operation;
    let mut row = vec![
        operation.id.to_string(),
        operation.kind.name().to_owned(),
        operation.target.name.to_string(),
        operation.state.name().to_owned(),
        units::show_time(operation.created_at),
        view.progress.as_ref().map(live::words).unwrap_or_default(),
    ];
    if wide {
        row.push(operation.subject.clone());
        row.push(operation.finished_at.map(units::show_time).unwrap_or_default());
    }
    row
}

/// An operation for people, with the receipt of a migration.
pub(crate) fn facts(view: OperationView) -> String {
    let operation = &view.operation;
    let mut lines = vec![
        ("id", operation.id.to_string()),
        ("kind", operation.kind.name().to_owned()),
        ("target", operation.target.name.to_string()),
        ("state", operation.state.name().to_owned()),
        ("asked by", operation.subject.clone()),
        ("created", units::show_time(operation.created_at)),
    ];
    match (&operation.state, operation.finished_at) {
        (_, Some(at)) => lines.push(("finished", units::show_time(at))),
        (_, None) => lines.push(("ends by", units::show_time(operation.ends_by))),
    }
    if let OperationState::Failed { reason } = &operation.state {
        lines.push(("reason", reason.message.clone()));
        lines.push(("next", reason.hint.clone()));
    }
    if let Some(progress) = &view.progress {
        lines.push(("progress", live::words(progress)));
    }
    let facts = table::facts(&lines);
    match operation.migration() {
        Some(migration) => format!("{facts}\n{}", receipt::show(migration)),
        None => facts,
    }
}
