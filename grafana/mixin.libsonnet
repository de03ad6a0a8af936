// A monitoring mixin: `jsonnet -J vendor` or mixtool render it, and other mixins add to it.
local groups = std.parseYaml(importstr 'prometheus/koopmon.rules.yml').groups;
local only(kind, change) = [
  group { rules: [change(rule) for rule in group.rules if kind in rule && change(rule) != null] }
  for group in groups
  if std.length([rule for rule in group.rules if kind in rule && change(rule) != null]) > 0
];
{
  _config+:: {
    // Address of a page with the runbooks; null: the page /alerts of the monitor.
    docsUrl: null,
    // Alerts to leave out, by name.
    disabled: [],
    // Changes of single alerts by name, such as { KoopmonRiskHigh: { 'for': '5m' } }.
    alerts: {},
  },
  local config = self._config,
  local changed(rule) =
    if std.member(config.disabled, rule.alert) then null
    else rule
         + (if config.docsUrl == null then {} else { annotations+: { runbook_url: config.docsUrl + '#' + rule.alert } })
         + std.get(config.alerts, rule.alert, {}),
  grafanaDashboards+:: {
    'koopmon-fleet.json': import 'dashboards/koopmon-fleet.json',
    'koopmon-run.json': import 'dashboards/koopmon-run.json',
    'koopmon-monitor.json': import 'dashboards/koopmon-monitor.json',
  },
  prometheusAlerts+:: { groups+: only('alert', changed) },
  prometheusRules+:: { groups+: only('record', function(rule) rule) },
}
