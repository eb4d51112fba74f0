"""What several gateways share through Redis or Valkey (SPEC 20.1). Loaded only where GATEWAY_STATE is set."""
