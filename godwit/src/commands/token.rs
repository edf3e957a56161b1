//! `godwit token`: tokens with which programs come in.

use std::path::PathBuf;

use clap::Subcommand;
use clap_complete::ArgValueCompleter;
use identity::secret_file;
use model::{Name, Role, TokenId, query::TokenView};
use serde_json::json;

use super::{Heading, Session, completion, host::said, user::roles};
use crate::{
    exit::{Exit, Failure},
    out::{self, units},
};

/// What can be done with tokens.
#[derive(Subcommand, Debug)]
pub(crate) enum Token {
    /// Make a token of the project, and print it: it is shown this once
    Create {
        /// What people call it
        name: Name,
        /// What it may do in the project: at most what you may, and never more than you still may
        #[arg(long, value_parser = roles(), value_name = "ROLE")]
        role: Role,
        /// How long it is valid; without it, until it is revoked
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "SECONDS")]
        ttl: Option<u32>,
        /// Write it to a new file, mode 0600, instead of printing it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// List the project's tokens
    List,
    /// End a token
    Revoke {
        /// Its id
        #[arg(add = ArgValueCompleter::new(completion::tokens))]
        token: TokenId,
    },
}

impl Token {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Create { name, role, ttl, out } => {
                let body = json!({ "name": name, "role": role, "ttl_s": ttl });
                let mut made = session.client.post("/v1/tokens", &body).await?;
                let text = made["token"].as_str().unwrap_or_default().to_owned();
                if let Some(path) = &out {
                    let written = secret_file::create(path, format!("{text}\n").as_bytes());
                    if let Err(error) = written {
                        // What nobody has is not left valid.
                        let id = made["id"].as_str().unwrap_or_default().to_owned();
                        session.client.delete(&format!("/v1/tokens/{id}")).await?;
                        return Err(Failure::of(Exit::Failed, &error).hint("name a file that is not there yet"));
                    }
                    made["token"] = json!(path);
                }
                if session.format.is_data() {
                    return out::data(session.format, &made);
                }
                match out {
                    Some(path) => said(session, true, &format!("token {name} is in {}", path.display())),
                    None => out::line(&out::safe::text(&text)),
                }
            }
            Self::List => session.list("/v1/tokens", None, HEADING, row).await,
            Self::Revoke { token } => {
                let what = format!("token {token}");
                let done = session.delete(&format!("/v1/tokens/{token}"), &what).await?.is_some();
                said(session, done, &format!("{what} is revoked"))
            }
        }
    }
}

const HEADING: Heading = Heading {
    narrow: &["ID", "NAME", "ROLE", "OWNER", "EXPIRES"],
    wide: &["SUBJECT", "PROJECT", "MADE BY", "MADE"],
};

fn row(token: TokenView, wide: bool) -> Vec<String> {
    let time = |at: Option<model::Timestamp>| at.map(units::show_time).unwrap_or_default();
    let mut row = vec![
        token.id.to_string(),
        token.name.map(|name| name.to_string()).unwrap_or_default(),
        token.role.to_string(),
        token.owner.map(|owner| owner.name.to_string()).unwrap_or_default(),
        token.expires_at.map_or_else(|| "never".to_owned(), units::show_time),
    ];
    if wide {
        let project = token.project.map(|project| project.name.to_string());
        row.extend([
            token.subject,
            project.unwrap_or_default(),
            token.created_by,
            time(token.created_at),
        ]);
    }
    row
}
