//! `godwit user`: people, and what they may do.

use std::path::PathBuf;

use clap::{
    Subcommand,
    builder::{PossibleValuesParser, TypedValueParser as _},
};
use clap_complete::ArgValueCompleter;
use model::{Name, Role, name::Reference, query::UserView};
use serde_json::json;

use super::{
    Heading, Session, completion,
    host::said,
    login::{new_password, password},
};
use crate::{
    exit::Failure,
    out::{self, table, units},
};

/// What can be done with users.
#[derive(Subcommand, Debug)]
pub(crate) enum User {
    /// Make a user; with --role, one who may do something in the project
    Create {
        /// Its name
        name: Name,
        /// What it may do in the project
        #[arg(long, value_parser = roles(), value_name = "ROLE")]
        role: Option<Role>,
        /// File whose first line is the password; `-` is standard input
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
    },
    /// List users with a role in the project; cloud admins see all
    List,
    /// Show a user
    Show {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::users))]
        user: Reference,
    },
    /// Delete a user with its sessions and tokens
    Delete {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::users))]
        user: Reference,
    },
    /// Keep a user out; its sessions and tokens end for good
    Disable {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::users))]
        user: Reference,
    },
    /// Let a user in again
    Enable {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::users))]
        user: Reference,
    },
    /// Change a password: your own, or as a cloud admin another's
    Password {
        /// Name or id; without it, yourself
        #[arg(add = ArgValueCompleter::new(completion::users))]
        user: Option<Reference>,
        /// File whose first line is the new password; `-` is standard input
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// File whose first line is the present password
        #[arg(long, value_name = "FILE")]
        old_password_file: Option<PathBuf>,
    },
    /// Give a user a role in the project, in place of the one that it has; cloud-admin counts everywhere
    Grant {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::users))]
        user: Reference,
        /// The role
        #[arg(value_parser = roles())]
        role: Role,
    },
    /// Take a user's role in the project away
    Revoke {
        /// Name or id
        #[arg(add = ArgValueCompleter::new(completion::users))]
        user: Reference,
        /// The role of cloud admin instead
        #[arg(long)]
        cloud_admin: bool,
    },
}

/// Roles by their names.
pub(crate) fn roles() -> impl clap::builder::TypedValueParser<Value = Role> {
    const ROLES: [Role; 4] = [Role::Viewer, Role::Operator, Role::ProjectAdmin, Role::CloudAdmin];
    PossibleValuesParser::new(ROLES.map(Role::name)).try_map(|text| {
        let role = ROLES.into_iter().find(|role| role.name() == text);
        role.ok_or("this is no role")
    })
}

impl User {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let client = &session.client;
        match self {
            Self::Create {
                name,
                role,
                password_file,
            } => {
                let password = new_password(password_file.as_deref(), &format!("password of {name}"))?;
                let body = json!({ "name": name, "password": password });
                let mut made = client.post("/v1/users", &body).await?;
                if let Some(role) = role {
                    client
                        .post(&format!("/v1/users/{name}/grant"), &json!({ "role": role }))
                        .await?;
                    made = client.get(&format!("/v1/users/{name}")).await?;
                }
                if session.format.is_data() {
                    return out::data(session.format, &made);
                }
                said(session, true, &format!("user {name} is made"))
            }
            Self::List => session.list("/v1/users", None, HEADING, row).await,
            Self::Show { user } => session.show(&format!("/v1/users/{user}"), facts).await,
            Self::Delete { user } => {
                let what = format!("user {user}");
                let done = session.delete(&format!("/v1/users/{user}"), &what).await?.is_some();
                said(session, done, &format!("{what} is deleted"))
            }
            Self::Disable { user } => set_disabled(session, &user, true).await,
            Self::Enable { user } => set_disabled(session, &user, false).await,
            Self::Password {
                user,
                password_file,
                old_password_file,
            } => {
                let me = client.get("/v1/whoami").await?;
                let subject = me["subject"].as_str().unwrap_or_default().to_owned();
                let user = user.map_or(subject, |user| user.to_string());
                let knows = me["role"] == Role::CloudAdmin.name() && old_password_file.is_none();
                let old = match knows {
                    true => None,
                    false => Some(password(old_password_file.as_deref(), "present password")?),
                };
                let new = new_password(password_file.as_deref(), &format!("new password of {user}"))?;
                let body = json!({ "old": old, "password": new });
                client.post(&format!("/v1/users/{user}/password"), &body).await?;
                said(
                    session,
                    true,
                    &format!("the password of {user} is changed; its other sessions ended"),
                )
            }
            Self::Grant { user, role } => {
                client
                    .post(&format!("/v1/users/{user}/grant"), &json!({ "role": role }))
                    .await?;
                said(session, true, &format!("user {user} is {role}"))
            }
            Self::Revoke { user, cloud_admin } => {
                let body = json!({ "cloud_admin": cloud_admin });
                client.post(&format!("/v1/users/{user}/revoke"), &body).await?;
                said(session, true, &format!("user {user} has that role no more"))
            }
        }
    }
}

async fn set_disabled(session: &Session, user: &Reference, disabled: bool) -> Result<(), Failure> {
    let path = format!("/v1/users/{user}");
    let value = session.client.patch(&path, &json!({ "disabled": disabled })).await?;
    if session.format.is_data() {
        return out::data(session.format, &value);
    }
    let what = if disabled { "disabled" } else { "enabled" };
    said(session, true, &format!("user {user} is {what}"))
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "ROLES", "STATE"],
    wide: &["CREATED", "ID"],
};

fn roles_of(user: &UserView) -> String {
    let everywhere = user.cloud_admin.then(|| Role::CloudAdmin.to_string());
    let here = user
        .grants
        .iter()
        .map(|grant| format!("{} in {}", grant.role, grant.project.name));
    everywhere.into_iter().chain(here).collect::<Vec<_>>().join(", ")
}

fn state(user: &UserView) -> String {
    if user.disabled { "disabled" } else { "enabled" }.to_owned()
}

fn row(user: UserView, wide: bool) -> Vec<String> {
    let mut row = vec![user.name.to_string(), roles_of(&user), state(&user)];
    if wide {
        row.extend([units::show_time(user.created_at), user.id.to_string()]);
    }
    row
}

fn facts(user: UserView) -> String {
    table::facts(&[
        ("name", user.name.to_string()),
        ("id", user.id.to_string()),
        ("roles", roles_of(&user)),
        ("state", state(&user)),
        ("created", units::show_time(user.created_at)),
    ])
}
