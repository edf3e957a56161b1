//! All endpoints in one list, and the OpenAPI document that is made of it.

use std::sync::LazyLock;

use utoipa::{
    Modify, OpenApi,
    openapi::security::{Http, HttpAuthScheme, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    App, addressing, audit, blobs, events, hosts, inventory, metrics, operations, people, ports, projects, system,
    templates, tokens, vms,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Godwit",
        description = "Provisions virtual machines on a pool of hosts and moves them while they run. Changes are asked for with \
            POST, PUT, PATCH and DELETE; slow ones are answered with an operation (202). A header Idempotency-Key makes a repeated \
            request the same request; a header Godwit-Project with a name or id chooses the project that a request is about, \
            without it the token's own is meant; If-Match with the ETag of a VM refuses it when the VM has changed. Version 1 only grows: clients \
            ignore fields and enum values that they do not know.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    security(("token" = [])),
    modifiers(&Token),
    components(schemas(events::ProgressEvent, model::Notice))
)]
struct Document;

struct Token;

impl Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

/// Every endpoint, with its description.
pub(crate) fn endpoints() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(vms::list, vms::create))
        .routes(routes!(vms::show, vms::delete))
        .routes(routes!(vms::start))
        .routes(routes!(vms::stop))
        .routes(routes!(vms::kill))
        .routes(routes!(vms::reboot))
        .routes(routes!(vms::pause))
        .routes(routes!(vms::resume))
        .routes(routes!(vms::migrate))
        .routes(routes!(vms::console))
        .routes(routes!(hosts::list))
        .routes(routes!(hosts::show, hosts::change, hosts::remove))
        .routes(routes!(hosts::abandon))
        .routes(routes!(hosts::add_token))
        .routes(routes!(hosts::join_cell))
        .routes(routes!(templates::list, templates::create))
        .routes(routes!(templates::show, templates::delete))
        .routes(routes!(blobs::put, blobs::head))
        .routes(routes!(operations::list))
        .routes(routes!(operations::show))
        .routes(routes!(operations::cancel))
        .routes(routes!(operations::wait))
        .routes(routes!(inventory::networks))
        .routes(routes!(addressing::set))
        .routes(routes!(inventory::pools))
        .routes(routes!(inventory::volumes))
        .routes(routes!(ports::list))
        .routes(routes!(ports::show, ports::change))
        .routes(routes!(ports::groups, ports::create_group))
        .routes(routes!(ports::show_group, ports::delete_group))
        .routes(routes!(ports::add_rule))
        .routes(routes!(ports::remove_rule))
        .routes(routes!(people::login))
        .routes(routes!(people::logout))
        .routes(routes!(people::whoami))
        .routes(routes!(people::list, people::create))
        .routes(routes!(people::show, people::change, people::delete))
        .routes(routes!(people::password))
        .routes(routes!(people::grant))
        .routes(routes!(people::revoke))
        .routes(routes!(projects::list, projects::create))
        .routes(routes!(projects::show, projects::delete))
        .routes(routes!(projects::quota))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::revoke))
        .routes(routes!(audit::list))
        .routes(routes!(metrics::vms))
        .routes(routes!(metrics::vm))
        .routes(routes!(metrics::hosts))
        .routes(routes!(metrics::host))
        .routes(routes!(events::follow))
        .routes(routes!(system::health))
        .routes(routes!(system::metrics))
        .routes(routes!(system::document))
}

/// The OpenAPI document, as it is served and as it is committed in `docs/openapi.json`.
#[must_use]
pub fn openapi_json() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let (_, document) = endpoints().split_for_parts();
        let mut text = document.to_pretty_json().expect("the document has a JSON form");
        text.push('\n');
        text
    });
    &TEXT
}
