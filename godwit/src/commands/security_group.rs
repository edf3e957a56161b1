//! `godwit security-group`: rules that ports share.

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::ArgValueCompleter;
use model::{
    Name,
    name::Reference,
    policy::{Cidr, Direction, NewRule, Ports, Protocol, Remote, SecurityRule},
    query::SecurityGroupView,
};
use serde_json::json;

use super::{Heading, Session, completion, host::said};
use crate::{
    exit::Failure,
    out::{self, table},
};

/// What can be done with security groups.
#[derive(Subcommand, Debug)]
pub(crate) enum SecurityGroup {
    /// Make a group: its ports may begin what they like, nobody may begin anything with them
    Create {
        /// Its name
        name: Name,
    },
    /// List groups
    List,
    /// Show a group and its rules
    Show(One),
    /// Delete a group that nobody uses
    Delete(One),
    /// Allow something, at once for all ports of the group
    AddRule(Box<AddRule>),
    /// Take a rule away, at once for all ports of the group
    RemoveRule {
        #[command(flatten)]
        one: One,
        /// The rule's number, as `show` tells it
        number: u32,
    },
}

/// Which group.
#[derive(Args, Debug)]
pub(crate) struct One {
    /// Name or id
    #[arg(add = ArgValueCompleter::new(completion::security_groups))]
    group: Reference,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Way {
    /// To the guest.
    Ingress,
    /// From the guest.
    Egress,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Kind {
    #[default]
    Any,
    Tcp,
    Udp,
    Icmp,
}

/// What a rule allows.
#[derive(Args, Debug)]
pub(crate) struct AddRule {
    #[command(flatten)]
    one: One,
    /// Which way the first packet goes; answers pass
    #[arg(value_enum)]
    direction: Way,
    /// Of which protocol
    #[arg(long, value_enum, default_value_t)]
    protocol: Kind,
    /// To which port or ports: 22, or 8000-8100; without it, all
    #[arg(long, value_name = "PORT[-PORT]", alias = "ports")]
    port: Option<Ports>,
    /// To or from addresses: 10.0.0.0/8; without it, everybody
    #[arg(long, value_name = "CIDR")]
    remote: Option<Cidr>,
    /// To or from the ports of a group
    #[arg(long, value_name = "GROUP", conflicts_with = "remote", add = ArgValueCompleter::new(completion::security_groups))]
    remote_group: Option<Reference>,
}

impl SecurityGroup {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let client = &session.client;
        match self {
            Self::Create { name } => {
                let made = client.post("/v1/security-groups", &json!({ "name": name })).await?;
                if session.format.is_data() {
                    return out::data(session.format, &made);
                }
                said(session, true, &format!("security group {name} is made"))
            }
            Self::List => session.list("/v1/security-groups", None, HEADING, row).await,
            Self::Show(One { group }) => session.show(&format!("/v1/security-groups/{group}"), facts).await,
            Self::Delete(One { group }) => {
                let what = format!("security group {group}");
                let done = session.delete(&format!("/v1/security-groups/{group}"), &what).await?;
                said(session, done.is_some(), &format!("{what} is deleted"))
            }
            Self::AddRule(add) => add.run(session).await,
            Self::RemoveRule {
                one: One { group },
                number,
            } => {
                let path = format!("/v1/security-groups/{group}/rules/{number}");
                client.delete(&path).await?;
                said(
                    session,
                    true,
                    &format!("rule {number} of security group {group} is removed"),
                )
            }
        }
    }
}

impl AddRule {
    async fn run(self, session: &Session) -> Result<(), Failure> {
        let path = format!("/v1/security-groups/{}/rules", self.one.group);
        let rule = NewRule {
            direction: match self.direction {
                Way::Ingress => Direction::Ingress,
                Way::Egress => Direction::Egress,
            },
            protocol: match self.protocol {
                Kind::Any => Protocol::Any,
                Kind::Tcp => Protocol::Tcp,
                Kind::Udp => Protocol::Udp,
                Kind::Icmp => Protocol::Icmp,
            },
            ports: self.port,
            remote: self.remote,
            remote_group: self.remote_group,
        };
        let value = session.client.post(&path, &rule).await?;
        if session.format.is_data() {
            return out::data(session.format, &value);
        }
        out::text(&facts(out::read(&value)?))
    }
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "RULES", "PORTS"],
    wide: &["ID"],
};

fn row(view: SecurityGroupView, wide: bool) -> Vec<String> {
    let mut row = vec![
        view.group.name.to_string(),
        view.group.rules.len().to_string(),
        view.ports.to_string(),
    ];
    if wide {
        row.push(view.group.id.to_string());
    }
    row
}

fn remote(view: &SecurityGroupView, rule: &SecurityRule) -> String {
    match rule.remote {
        Remote::Any => "everybody".to_owned(),
        Remote::Cidr(range) => range.to_string(),
        Remote::Group(id) => {
            let named = view.remote_groups.iter().find(|group| group.id == id);
            named.map_or_else(|| id.to_string(), |group| format!("group {}", group.name))
        }
    }
}

fn facts(view: SecurityGroupView) -> String {
    let rules = view.group.rules.iter().map(|rule| {
        vec![
            rule.number.to_string(),
            rule.direction.to_string(),
            rule.protocol.to_string(),
            rule.ports.map_or_else(|| "all".to_owned(), |ports| ports.to_string()),
            remote(&view, rule),
        ]
    });
    let head = table::facts(&[
        ("name", view.group.name.to_string()),
        ("id", view.group.id.to_string()),
        ("ports", view.ports.to_string()),
    ]);
    let table = table::rows(&["RULE", "DIRECTION", "PROTOCOL", "PORTS", "TO OR FROM"], rules);
    format!("{head}\n{table}")
}
